"""How a process ends when it fails: it prints the reason, and the other processes of the launch end too.

The launcher (accelerate, torchrun) ends all processes of a machine when one is gone. A process that fails only because
another one died stays silent until then, so that the real reason is not buried under its messages.
"""

import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

WAIT_FOR_RANK_0 = 2.0  # seconds; when all ranks meet the same error, rank 0 prints it first
WAIT_FOR_LAUNCHER = 15.0  # seconds; a rank that lost another one lets that one and the launcher speak first


def stop(error: Exception) -> NoReturn:
    """
    End this process with one line and no traceback. It is for errors that the user can mend; call it where `error` is
    handled.

    In a launch of several processes the line names the rank, and the launcher ends the others.

    Raises:
        SystemExit: with "error: ..." in a single process. One of several processes ends at once, without an exception.
            If the reader of our output left early, as in `gcl train --help | head`, there is no message.
    """
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes when it shuts down
        sys.exit(1)
    text = str(error)
    if isinstance(error, SafetensorError):
        text = f"a .safetensors file of the model is damaged or cut off ({error}): save or download it again"
    if _processes() == 1:
        sys.exit(f"error: {text}")
    _leave(error, text)


@contextmanager
def failing_together() -> Iterator[None]:
    """A context for the main function: an exception in one of several processes ends all of them.

    In a single process it changes nothing.
    """
    try:
        yield
    except Exception as error:
        if _processes() == 1:
            raise
        _leave(error, "\n" + traceback.format_exc())


def _leave(error: Exception, text: str) -> NoReturn:
    rank = int(os.environ.get("RANK", 0))
    if _lost_another(error):
        time.sleep(WAIT_FOR_LAUNCHER)
        text = f"lost another process, whose output says why: {error}"
    elif rank > 0:
        time.sleep(WAIT_FOR_RANK_0)
    print(f"error: rank {rank}: {text}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    get_error_handler().record_exception(error)  # for the launcher's summary
    os._exit(1)  # without clean-up, which might wait for the other processes


def _lost_another(error: Exception) -> bool:
    # gloo raises a plain RuntimeError
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "by peer" in str(error))


def _processes() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))
