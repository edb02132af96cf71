"""What a command hides: bars and warnings about the insides of other libraries, and nothing else."""

import logging
import sys

import datasets
import huggingface_hub
import pytest
import transformers

from universal_gcl.quiet import quiet_imports, quiet_libraries

TOKENS = "The tokenizer has new PAD/BOS/EOS tokens that differ from the model config"


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    monkeypatch.setattr(transformers.utils.logging, "_tqdm_hook", None)
    for name in ("transformers.trainer_utils", "bitsandbytes.backends.cpu.ops"):
        monkeypatch.setattr(logging.getLogger(name), "filters", [])
    yield
    datasets.enable_progress_bars()


@pytest.mark.parametrize("terminal", [True, False])
def test_bars_of_loading_and_saving_are_hidden(terminal, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    quiet_libraries()
    for name in ("Loading weights", "encode"):
        for _ in transformers.utils.logging.tqdm(range(3), desc=name):
            pass
    printed = capsys.readouterr().err
    assert "Loading weights" not in printed
    assert ("encode" in printed) == terminal  # in a log file there are no bars
    assert datasets.are_progress_bars_disabled()
    assert not huggingface_hub.utils.are_progress_bars_disabled()


def test_only_warnings_that_nobody_can_act_on_are_hidden(caplog):
    quiet_imports()
    quiet_imports()  # a second time changes nothing
    logger = logging.getLogger("transformers.trainer_utils")
    logger.warning("%s. Updated", TOKENS)
    logger.warning("something that matters")
    assert [record.message for record in caplog.records] == ["something that matters"]
    assert len(logger.filters) == 1
