"""How a process ends when it fails: with its reason on the terminal, and the other processes of the launch with it.

The launcher (accelerate, torchrun) ends all processes of a machine once one has gone. A process that only waits for a
dead one keeps still until then, so that the reason is not buried under the noise of those it left behind.
"""

import os
import sys
import time
import traceback
from contextlib import contextmanager

import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

WAIT_FOR_RANK_0 = 2.0  # seconds that ranks over 0 leave to rank 0, for errors that all ranks meet
WAIT_FOR_LAUNCHER = 15.0  # seconds that a rank which lost another leaves to that one and the launcher


def stop(error):
    """
    End this process, called where `error` is handled, for errors that the user can mend: one line, no traceback.

    In a launch of several processes the line names the rank, and the launcher ends the others.

    Raises:
        SystemExit: with "error: ..."; only in a single process. In several the process is gone at once.
    """
    text = str(error)
    if isinstance(error, SafetensorError):
        text = f"a .safetensors file of the model is damaged or cut off ({error}): save or download it again"
    if _processes() == 1:
        sys.exit(f"error: {text}")
    _leave(error, text)


@contextmanager
def failing_together():
    """Around the main function: an exception in one of several processes ends all of them. One process is let be."""
    try:
        yield
    except Exception as error:
        if _processes() == 1:
            raise
        _leave(error, "\n" + traceback.format_exc())


def _leave(error, text):
    rank = int(os.environ.get("RANK", 0))
    if _lost_another(error):
        time.sleep(WAIT_FOR_LAUNCHER)
        text = f"lost another process, whose output says why: {error}"
    elif rank > 0:
        time.sleep(WAIT_FOR_RANK_0)
    print(f"error: rank {rank}: {text}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    get_error_handler().record_exception(error)  # for the launcher's summary
    os._exit(1)  # no clean-up that might wait for the others


def _lost_another(error):
    # gloo raises a plain RuntimeError
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "by peer" in str(error))


def _processes():
    return int(os.environ.get("WORLD_SIZE", 1))
