"""The int8 codes of a pool, which `retrieval.screening` compares: made part by part during a search, or saved.

A candidate x is written as x = μ + s∘X + r, where X is int8 and r is the error of rounding and clipping. μ and s are
estimated from a sample of the pool. A bad estimate only makes r longer. The codes of a store are saved in its folder:

- `codes.npy`: (M, D') int8, the X of each vector, padded with zeros to a multiple of 8 dimensions.
- `codes.safetensors`: `lengths` (3, M) float32, which are |X|, |r| and |x|; `mean` (D,) and `scale` (D,) float32, which
  are μ and s. This file is written last, so the codes are complete if it exists.

The first search of a store writes both files. They are written again if they don't belong to the vectors of the store.
You may delete them at any time.
"""

import hashlib
import json
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from transformers.utils import logging

from universal_gcl.retrieval.search import Matrix, as_tensor
from universal_gcl.retrieval.store import Store, Vectors, write_whole

logger = logging.get_logger(__name__)

_SAMPLE = 1 << 14  # candidates from which μ and s are estimated
_SAMPLE_RUNS = 64  # the sample consists of so many runs of neighbours, spread evenly over the pool
_ROWS_AT_ONCE = 1 << 9  # few enough to stay in the cache
_ROWS_WRITTEN_AT_ONCE = 1 << 12
_CHECKED = 64  # rows of saved codes that are compared with the vectors


class Part(NamedTuple):
    """The int8 codes of n neighbouring candidates."""

    codes: torch.Tensor  # (n, D') int8, X
    lengths: torch.Tensor  # (3, n) float32, |X|, |r| and |x|


class Codes(Protocol):
    """The int8 codes of a pool; `mean` and `scale` are (D,) float32, μ and s."""

    mean: torch.Tensor
    scale: torch.Tensor

    def part(self, start: int, stop: int) -> Part:
        """The codes of the candidates from `start` to `stop`."""


class StreamedCodes:
    """
    Codes that are computed on `device` each time a part of them is read.

    Args:
        candidates: (C, D).
        device: the device to compute on.
    """

    def __init__(self, candidates: Matrix, device: str | torch.device = "cpu") -> None:
        self.candidates, self.device = candidates, device
        runs = [as_tensor(candidates[start:stop]) for start, stop in runs_over(candidates.shape[0], _SAMPLE)]
        sample = torch.cat(runs).to(device, torch.float32)
        self.mean = sample.mean(dim=0)
        low, high = sample.aminmax(dim=0)
        scale = torch.maximum(high - self.mean, self.mean - low) / 127
        # a dimension that hardly varies in the sample may vary elsewhere in the pool
        self.scale = scale.clamp(min=scale.mean() / 1000) if scale.any() else torch.ones_like(scale)
        self._inverse, self._offset = 1 / self.scale, -self.mean / self.scale

    def part(self, start: int, stop: int) -> Part:
        """The codes of the candidates from `start` to `stop`."""
        codes, lengths = [], []
        rows = as_tensor(self.candidates[start:stop]).to(self.device)
        for some in rows.split(_ROWS_AT_ONCE):
            part = some.to(torch.float32)
            scaled = torch.addcmul(self._offset, part, self._inverse)
            rounded = scaled.round().clamp_(-127, 127)
            codes.append(rounded.to(torch.int8))
            residual = scaled.sub_(rounded).mul_(self.scale)
            lengths.append(torch.stack([x.norm(dim=1) for x in (rounded, residual, part)]))
        padded = F.pad(torch.cat(codes), (0, -rows.shape[1] % 8))  # CUDA's int8 product needs a multiple of 8
        return Part(padded, torch.cat(lengths, dim=1))


class SavedCodes:
    """
    Codes that were saved.

    Args:
        codes: (M, D') int8, memory-mapped.
        lengths: (3, M) float32, |X|, |r| and |x|.
        mean: (D,) float32, μ.
        scale: (D,) float32, s.
    """

    def __init__(self, codes: torch.Tensor, lengths: torch.Tensor, mean: torch.Tensor, scale: torch.Tensor) -> None:
        self.codes, self.lengths, self.mean, self.scale = codes, lengths, mean, scale

    def part(self, start: int, stop: int) -> Part:
        """The codes of the candidates from `start` to `stop`."""
        return Part(self.codes[start:stop], self.lengths[:, start:stop])

    def to(self, device: str | torch.device) -> "SavedCodes":
        """The same codes on a device. A part is moved there when it is read."""
        return self if torch.device(device).type == "cpu" else _MovedCodes(self, device)


class _MovedCodes(SavedCodes):
    def __init__(self, saved: SavedCodes, device: str | torch.device) -> None:
        super().__init__(saved.codes, saved.lengths, saved.mean.to(device), saved.scale.to(device))
        self.device = device

    def part(self, start: int, stop: int) -> Part:
        return Part(*(tensor.to(self.device) for tensor in super().part(start, stop)))


def runs_over(count: int, size: int) -> list[tuple[int, int]]:
    """
    A sample of a pool as runs of neighbours, spread over the whole pool in case it is sorted by something.

    Args:
        count: number of candidates in the pool.
        size: number of candidates in the sample. It may become slightly larger.

    Returns:
        The start and stop of each run. The runs don't overlap if `size` is at most half of `count`.
    """
    length = min(count, -(-size // _SAMPLE_RUNS))
    starts = torch.linspace(0, count - length, _SAMPLE_RUNS).long().tolist()
    return [(start, start + length) for start in starts]


def saved_codes(store: Store) -> SavedCodes | None:
    """The saved codes of a store. If there are none, they are computed and saved first.

    Logs a warning and returns None if the folder of the store can't be written to.
    """
    saved = _open(store)
    if saved is None:
        try:
            _write(store)
        except OSError as error:
            logger.warning(f"{store.folder}: the int8 codes can't be saved, so each search computes them ({error})")
            return None
        saved = _open(store)
    return saved


def delete_codes(folder: Path) -> None:
    """Delete the saved codes in the folder of a store. Call it before its vectors change."""
    for path in _paths(folder)[::-1]:
        path.unlink(missing_ok=True)


def _paths(folder: Path) -> tuple[Path, Path]:
    return folder / "codes.npy", folder / "codes.safetensors"


def _write(store: Store) -> None:
    pool, count = StreamedCodes(store.vectors), len(store.vectors)
    lengths: list[torch.Tensor] = []
    codes_path, path = _paths(store.folder)

    def write(file: BinaryIO) -> None:
        shape = (count, store.vectors.shape[1] + -store.vectors.shape[1] % 8)
        np.lib.format.write_array_header_1_0(file, {"descr": "|i1", "fortran_order": False, "shape": shape})
        for start in range(0, count, _ROWS_WRITTEN_AT_ONCE):
            part = pool.part(start, start + _ROWS_WRITTEN_AT_ONCE)
            file.write(part.codes.numpy().data)
            lengths.append(part.lengths)

    path.unlink(missing_ok=True)  # it may belong to other codes
    write_whole(codes_path, write)
    tensors = {"lengths": torch.cat(lengths, dim=1), "mean": pool.mean, "scale": pool.scale}
    write_whole(path, lambda file: file.write(save(tensors, metadata={"of": _identity(store)})))


def _open(store: Store) -> SavedCodes | None:
    """The saved codes, or None if there are none or they don't belong to the vectors of the store."""
    codes_path, path = _paths(store.folder)
    try:
        with safe_open(path, framework="pt") as file:
            if file.metadata().get("of") != _identity(store):
                return None
            tensors = {name: file.get_tensor(name) for name in ("lengths", "mean", "scale")}
        # opened as copy-on-write, though nothing is written, because torch warns about read-only memory
        saved = SavedCodes(torch.from_numpy(np.load(codes_path, mmap_mode="c")), **tensors)
    except (OSError, ValueError, SafetensorError):  # absent or damaged
        return None
    return saved if _fits(saved, store.vectors) else None


def _fits(saved: SavedCodes, vectors: Vectors) -> bool:
    """Whether the codes belong to these vectors. Compares a sample of them."""
    if len(saved.codes) != len(vectors):
        return False
    places = np.linspace(0, len(vectors) - 1, _CHECKED).astype(np.int64)
    rows = as_tensor(vectors[places]).float()
    codes, lengths = saved.codes[places], saved.lengths[:, places]
    residual = rows - saved.mean - saved.scale * codes[:, : rows.shape[1]]
    found = torch.stack([codes.float().norm(dim=1), residual.norm(dim=1), rows.norm(dim=1)])
    return torch.allclose(found, lengths, rtol=1e-3, atol=1e-6)


def _identity(store: Store) -> str:
    return hashlib.sha256(json.dumps(store.manifest, sort_keys=True).encode()).hexdigest()
