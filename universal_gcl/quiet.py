"""Keeps the output of a command to what its user can use: no bars for the insides of other libraries, no warnings about
them. In a log file there are no bars at all. Downloads from the Hub keep theirs, since they can take minutes.
"""

import logging
import sys
import warnings
from collections.abc import Callable
from typing import Any

UNHELPFUL = (
    "The tokenizer has new PAD/BOS/EOS tokens",  # transformers writes token ids to a config that doesn't use them
    "Failed to load CPU gemm_4bit_forward",  # a kernel of bitsandbytes that only 4-bit models on a CPU would call
    "mtime may not be reliable",  # transformers then sorts checkpoints by their step, which is right
)
UNHELPFUL_WARNING = ".is_gradient_checkpointing. is deprecated"  # peft reads this attribute, up to 0.21
HIDDEN_BARS = ("Loading weights", "Writing model shards")


def quiet_imports() -> None:
    """Call this before the heavy imports: some libraries warn when they are imported."""
    warnings.filterwarnings("ignore", UNHELPFUL_WARNING, FutureWarning)
    for name in ("bitsandbytes.backends.cpu.ops", "transformers.trainer_utils"):
        logger = logging.getLogger(name)
        if _is_helpful not in logger.filters:
            logger.addFilter(_is_helpful)


def quiet_libraries() -> None:
    """Hide the progress bars of datasets ("Map") and of transformers' loading and saving."""
    import datasets
    import transformers

    quiet_imports()
    datasets.disable_progress_bars()
    transformers.utils.logging.set_tqdm_hook(_bar)


def _is_helpful(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(UNHELPFUL)


def _bar(factory: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    if options.get("desc") in HIDDEN_BARS or not sys.stderr.isatty():
        options = options | {"disable": True}
    return factory(*args, **options)
