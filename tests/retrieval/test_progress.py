"""What long jobs print."""

import pytest

from universal_gcl.retrieval.progress import number


@pytest.mark.parametrize(("rate", "text"), [(0.41, "0.4"), (9.96, "10.0"), (25.4, "25"), (3654.2, "3,654")])
def test_rates_are_plain_numbers(rate, text):
    assert number(rate) == text
