"""The means of the loss's terms between two log entries."""

import pytest
import torch

from universal_gcl.training.logged_terms import LoggedTerms


def test_means_over_steps_of_several_batches():
    logged = LoggedTerms()
    for step in ((1.0, 3.0), (5.0, 7.0)):  # two optimiser steps of two batches each
        for place, value in enumerate(step):
            logged.add({"i→t": torch.tensor(value)}, torch.tensor(20.0), num_batches=2, ends_step=place == 1)
    assert logged.pop_means() == {"loss_i→t": pytest.approx(4.0), "logit_scale": pytest.approx(20.0)}
    assert logged.pop_means() == {}


def test_nothing_stays_after_clear():
    logged = LoggedTerms()
    logged.add({"i→t": torch.tensor(1.0)}, torch.tensor(9.0), num_batches=1, ends_step=True)
    logged.clear()
    logged.add({"t→i": torch.tensor(2.0)}, torch.tensor(8.0), num_batches=1, ends_step=True)
    assert logged.pop_means() == {"loss_t→i": 2.0, "logit_scale": 8.0}
