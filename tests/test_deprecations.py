"""Whatever our use of transformers would lose in a later version fails a test, however it is told: see setup.cfg."""

import warnings

import pytest
from transformers.utils import logging


def test_logged():
    logger = logging.get_logger("transformers.models.any")
    for message in ("`a` is deprecated", "`b` is depreacted and will be removed", "it will be removed in v5.29.0"):
        with pytest.raises(FutureWarning, match=message):
            logger.warning_once(message)
    logger.warning_once("something else")


@pytest.mark.parametrize(
    "module, category",
    [
        ("transformers.trainer", DeprecationWarning),
        ("peft.tuners", DeprecationWarning),
        ("modeling_gcl.modeling_gcl", DeprecationWarning),  # blamed on its caller
        ("transformers_modules.any.modeling_gcl", FutureWarning),
    ],
)
def test_warned(module, category):
    with pytest.raises(category, match="old"):
        warnings.warn_explicit("old", category, "any.py", 1, module=module)


def test_what_is_not_ours_is_only_told():
    with pytest.warns(DeprecationWarning):
        warnings.warn_explicit("old", DeprecationWarning, "any.py", 1, module="httpx._content")
