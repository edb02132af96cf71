"""Embeds the rows of `make_rows` into a folder, and logs how many contents each call of `encode` got.

Arguments: the folder, the log, the folder of images, and the mode: "once", "killed" (forks are killed until one
finishes), or "failing" (process 1 of a launch fails). In a launch, each process asserts the world size and has its own
log.
"""

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch

from modeling_gcl import GCLModel
from tests.support.backbones import WORDS, random_image, tiny_encoder, tiny_processor
from universal_gcl.retrieval.embed import embed_rows


def make_rows(folder):
    """Rows of all kinds, with their ids. Some contents occur twice."""
    rows = []
    for number in range(12):
        image = folder / f"{number}.png"
        if not image.exists():
            random_image(number, (24 + number, 30)).save(image)
        text = " ".join(WORDS[(number + n) % len(WORDS)] for n in range(2 + number % 4))
        rows += [(f"i{number}", {"image": str(image)}), (f"t{number}", {"text": text})]
        rows.append((f"it{number}", {"image": str(image), "text": text}))
        if number % 3 == 0:
            rows += [(f"again {number}", {"image": str(image)}), (f"both {number}", {"image": [str(image)] * 2})]
    return rows


class CountingModel(GCLModel):
    """Records how many rows each call of `encode` got."""

    @classmethod
    def wrap(cls, model, log=None):
        wrapped = object.__new__(cls)
        wrapped.__dict__ = dict(model.__dict__)
        wrapped.counts, wrapped.log = [], log
        return wrapped

    def encode(self, rows, *args, **kwargs):
        embeds = super().encode(rows, *args, **kwargs)
        self.counts.append(len(rows))
        if self.log is not None:
            with open(self.log, "a") as file:
                file.write(f"{len(rows)}\n")
        return embeds


def embed(folder, log, images, **options):
    model = GCLModel.from_encoder(tiny_encoder("clip"), fusion="normalized_sum").eval()
    rows = make_rows(Path(images))
    store = embed_rows(CountingModel.wrap(model, log), tiny_processor("clip"), rows, folder, shard_rows=2, **options)
    assert len(store) == len(rows)


def embed_killed(folder, log, images):
    """Prints the number of complete shards after each kill."""
    torch.set_num_threads(1)  # OpenMP's threads don't survive a fork
    rng = np.random.default_rng(0)
    for attempt in range(60):
        before = num_shards(folder)
        child = os.fork()
        if child == 0:
            if attempt % 2:
                kill_at_rename(2 + attempt % 3, before=attempt % 4 == 1)
            embed(folder, log, images)
            os._exit(0)
        if attempt % 2 == 0:
            while (
                num_shards(folder) == before
                and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
            ):
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.02))
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if status == 0:
            return
        assert os.WTERMSIG(status) == signal.SIGKILL
        print(num_shards(folder), flush=True)
    sys.exit("no attempt came through")


def num_shards(folder):
    return len(list(Path(folder).glob("vectors-*.npy")))


def kill_at_rename(number, before):
    """Kill this process at the given call of os.replace."""
    replace, calls = os.replace, []

    def counted(*args):
        calls.append(args)
        if len(calls) == number and before:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*args)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = counted


def embed_failing(folder, log, images):
    Path(log).with_name(f"{os.getpid()}.pid").touch()
    if os.environ["RANK"] == "1":
        CountingModel.encode = fail
    embed(folder, log, images)


def fail(*args, **kwargs):
    raise FloatingPointError("this process can't")


if __name__ == "__main__":
    folder, log, images, how = sys.argv[1:]
    if "RANK" in os.environ:
        log += f"-{os.environ['RANK']}"
    {"once": embed, "killed": embed_killed, "failing": embed_failing}[how](folder, log, images)
    if "RANK" in os.environ:
        assert torch.distributed.get_world_size() == int(os.environ["WORLD_SIZE"]) > 1
