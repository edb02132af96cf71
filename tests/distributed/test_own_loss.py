"""A loss of the user's own on two processes against one on the whole batch, plain and with GradCache."""

import torch

from tests.support.launches import ROOT, launch
from tests.support.own_losses import assert_same

WORKER = ROOT / "tests" / "distributed" / "own_loss_worker.py"


def test_two_processes_train_an_own_loss_as_one(tmp_path):
    runs = []
    for processes in (1, 2):
        launch(WORKER, tmp_path / f"{processes}.pt", processes=processes, cwd=tmp_path)
        runs.append(torch.load(tmp_path / f"{processes}.pt", weights_only=True))
    alone, shared = runs
    assert len(alone) == 7
    for case, found in shared.items():
        figures = {name: found.pop(name) for name in ("loss", "grad_norm")}
        for name, values in figures.items():
            torch.testing.assert_close(values, alone[case].pop(name), atol=1e-5, rtol=1e-5, msg=f"{case}: {name}")
        assert_same(found, alone[case], 1e-6)
    assert (alone["parameters, local anchors"]["loss.bias"] + 10).abs() > 1e-3
    assert_same(shared["override, cached"], alone["override, plain"], 1e-6)
