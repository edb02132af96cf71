"""A pool in int8, as `retrieval.screening` compares it: made part by part as a search goes, or once and kept.

A candidate x is x = μ + s∘X + r: X in int8, r what rounding and clipping left over. μ and s come from a sample of the
pool and need not fit: r says what they miss. Beside a store's vectors the pool is kept as

- `codes.npy`: (M, D') int8, X, with zeros up to a multiple of 8 dimensions;
- `codes.safetensors`: `lengths` (3, M) float32, |X|, |r| and |x|; `mean` and `scale` (D,) float32, μ and s; written
  last, so that its presence means that all is there.

Both are made when a store is first searched, and again when they are not of its vectors; they may be deleted.
"""

import hashlib
import json
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from transformers.utils import logging

from universal_gcl.retrieval.search import as_tensor
from universal_gcl.retrieval.store import Store, write_whole

logger = logging.get_logger(__name__)

_SAMPLE = 1 << 14
_SAMPLE_RUNS = 64  # of neighbouring candidates, spread evenly over the pool
_ROWS_AT_ONCE = 1 << 9  # small enough to stay in the cache
_ROWS_WRITTEN_AT_ONCE = 1 << 12
_CHECKED = 64  # rows, of a pool that was kept


class Part(NamedTuple):
    """Candidates in int8."""

    codes: torch.Tensor  # (n, D') int8, X
    lengths: torch.Tensor  # (3, n) float32, of X, r and x


class Streamed:
    """(C, D) candidates, quantised where they are asked for, on a device. `mean` and `scale`: (D,) float32."""

    def __init__(self, candidates, device="cpu"):
        self.candidates, self.device = candidates, device
        sample = [as_tensor(candidates[start:stop]) for start, stop in runs_over(candidates.shape[0], _SAMPLE)]
        sample = torch.cat(sample).to(device, torch.float32)
        self.mean = sample.mean(dim=0)
        low, high = sample.aminmax(dim=0)
        scale = torch.maximum(high - self.mean, self.mean - low) / 127
        # dimensions that hardly vary in the sample may do so elsewhere
        self.scale = scale.clamp(min=scale.mean() / 1000) if scale.any() else torch.ones_like(scale)
        self._inverse, self._offset = 1 / self.scale, -self.mean / self.scale

    def part(self, start: int, stop: int) -> Part:
        codes, lengths = [], []
        rows = as_tensor(self.candidates[start:stop]).to(self.device)
        for part in rows.split(_ROWS_AT_ONCE):
            part = part.to(torch.float32)
            scaled = torch.addcmul(self._offset, part, self._inverse)
            rounded = scaled.round().clamp_(-127, 127)
            codes.append(rounded.to(torch.int8))
            residual = scaled.sub_(rounded).mul_(self.scale)
            lengths.append(torch.stack([x.norm(dim=1) for x in (rounded, residual, part)]))
        codes = F.pad(torch.cat(codes), (0, -rows.shape[1] % 8))  # as CUDA's product needs it
        return Part(codes, torch.cat(lengths, dim=1))


class Kept:
    """A quantised pool that exists: `mean`, `scale`, and parts of memory-mapped codes."""

    def __init__(self, codes, lengths, mean, scale):
        self.codes, self.lengths, self.mean, self.scale = codes, lengths, mean, scale

    def part(self, start: int, stop: int) -> Part:
        return Part(self.codes[start:stop], self.lengths[:, start:stop])

    def to(self, device) -> "Kept":
        """Its parts on a device; the codes move when they are asked for."""
        return self if torch.device(device).type == "cpu" else _Moved(self, device)


class _Moved(Kept):
    def __init__(self, kept, device):
        super().__init__(kept.codes, kept.lengths, kept.mean.to(device), kept.scale.to(device))
        self.device = device

    def part(self, start, stop):
        return Part(*(tensor.to(self.device) for tensor in super().part(start, stop)))


def runs_over(count: int, size: int) -> list[tuple[int, int]]:
    """Runs of neighbours with `size` candidates in all or a few more, each from start to stop; over the whole pool, so
    that one sorted by anything is met as a whole. Disjoint if `size` is at most half of `count`."""
    length = min(count, -(-size // _SAMPLE_RUNS))
    starts = torch.linspace(0, count - length, _SAMPLE_RUNS).long().tolist()
    return [(start, start + length) for start in starts]


def quantised(store: Store) -> Kept | None:
    """The store's vectors in int8, made now if they are not kept beside them. None, with a warning, where they can't be
    kept because the folder can't be written."""
    kept = _open(store)
    if kept is None:
        try:
            _write(store)
        except OSError as error:
            logger.warning(f"{store.folder}: its int8 form can't be kept and is made in each search ({error})")
            return None
        kept = _open(store)
    return kept


def forget(folder) -> None:
    """Delete what is kept in a folder, whose vectors are about to change."""
    for path in _paths(folder)[::-1]:
        path.unlink(missing_ok=True)


def _paths(folder):
    return folder / "codes.npy", folder / "codes.safetensors"


def _write(store):
    pool, count, lengths = Streamed(store.vectors), len(store.vectors), []
    codes_path, path = _paths(store.folder)

    def write(file):
        shape = (count, store.vectors.shape[1] + -store.vectors.shape[1] % 8)
        np.lib.format.write_array_header_1_0(file, {"descr": "|i1", "fortran_order": False, "shape": shape})
        for start in range(0, count, _ROWS_WRITTEN_AT_ONCE):
            part = pool.part(start, start + _ROWS_WRITTEN_AT_ONCE)
            file.write(part.codes.numpy().data)
            lengths.append(part.lengths)

    path.unlink(missing_ok=True)  # of other codes
    write_whole(codes_path, write)
    tensors = {"lengths": torch.cat(lengths, dim=1), "mean": pool.mean, "scale": pool.scale}
    write_whole(path, lambda file: file.write(save(tensors, metadata={"of": _identity(store)})))


def _open(store):
    """What is kept, or None where nothing is, or not of these vectors."""
    codes_path, path = _paths(store.folder)
    try:
        with safe_open(path, framework="pt") as file:
            if file.metadata().get("of") != _identity(store):
                return None
            tensors = {name: file.get_tensor(name) for name in ("lengths", "mean", "scale")}
        # copy-on-write, never written: torch warns about read-only pages
        kept = Kept(torch.from_numpy(np.load(codes_path, mmap_mode="c")), **tensors)
    except (OSError, ValueError, SafetensorError):  # absent or damaged
        return None
    return kept if _fits(kept, store.vectors) else None


def _fits(kept, vectors):
    """Whether the codes are of these vectors, judged by some of them."""
    if len(kept.codes) != len(vectors):
        return False
    places = np.linspace(0, len(vectors) - 1, _CHECKED).astype(np.int64)
    rows = as_tensor(vectors[places]).float()
    codes, lengths = kept.codes[places], kept.lengths[:, places]
    residual = rows - kept.mean - kept.scale * codes[:, : rows.shape[1]]
    found = torch.stack([codes.float().norm(dim=1), residual.norm(dim=1), rows.norm(dim=1)])
    return torch.allclose(found, lengths, rtol=1e-3, atol=1e-6)


def _identity(store):
    return hashlib.sha256(json.dumps(store.manifest, sort_keys=True).encode()).hexdigest()
