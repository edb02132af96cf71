"""Measures how much memory is available, and how much embedding a pair takes, on any device, with a few pairs."""

import os
import sys
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.utils.memory import clear_device_cache
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from universal_gcl.training.random_state import RandomState

# Share of the available memory. The rest is left for memory inside operators, for fragmentation and the loss's tiles.
USABLE_SHARE = 0.8
LARGEST_CHUNK = 4096  # larger chunks are no faster
CGROUP = Path("/sys/fs/cgroup")


class AllocationCounter(TorchDispatchMode):
    """A context that counts the bytes of new tensors that are still alive, in forward and backward; `peak` is their
    maximum.

    Memory that an operator allocates and frees internally is not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live = 0
        self._storages: dict[int, int] = {}

    def ignore(self, tensor: torch.Tensor) -> None:
        """Don't count a tensor that existed before, when an operator returns a view of it."""
        self._storages.setdefault(tensor.untyped_storage().data_ptr(), 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self._count(value.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        if size == 0 or address in self._storages:
            return
        self._storages[address] = size
        self._live += size
        self.peak = max(self.peak, self._live)
        weakref.finalize(storage, self._forget, address)

    def _forget(self, address: int) -> None:
        self._live -= self._storages.pop(address)


def count_peak(run: Callable[[], Any], existing: Iterable[torch.Tensor]) -> int:
    """The most bytes alive at one time during `run()`, without the tensors in `existing`."""
    counter = AllocationCounter()
    for tensor in existing:
        counter.ignore(tensor)
    with counter:
        run()
    return counter.peak


def available_memory(device: torch.device) -> int:
    """Bytes that this process can still allocate on `device`. On the CPU, the processes of a machine get equal shares,
    and a container's limit is respected."""
    module: Any = None if device.type == "cpu" else torch.get_device_module(device)
    if hasattr(module, "mem_get_info"):
        clear_device_cache()
        return module.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        if limit != "max":
            free = min(free, int(limit) - int((CGROUP / "memory.current").read_text()))
    except OSError:  # no container, or one with cgroups version 1
        pass
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held so far: in tensors on a GPU, otherwise in resident memory."""
    if device.type != "cpu":
        return torch.get_device_module(device).max_memory_allocated(device)
    process = psutil.Process().memory_info()
    if hasattr(process, "peak_wset"):  # Windows
        return process.peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


@dataclass(frozen=True)
class PairMemory:
    """Forward and backward on n pairs at a time take `constant + n * per_pair` bytes, without the gradients of the
    parameters. A pair's inputs take `inputs` bytes, and its embeddings have `dim` entries."""

    per_pair: float
    constant: float
    inputs: float
    dim: int


def measure_pair_memory(
    embed: Callable[..., tuple], model: torch.nn.Module, inputs: dict[str, torch.Tensor]
) -> PairMemory:
    """
    Embed a few pairs, with gradient, in two batch sizes. The model and the random numbers stay unchanged.

    Args:
        embed (`Callable`): see `GradCache`.
        model (`torch.nn.Module`): in training mode.
        inputs (`dict[str, torch.Tensor]`): at least one pair, on the model's device.
    """
    num_pairs = len(next(iter(inputs.values())))
    buffers = [buffer.clone() for buffer in model.buffers()]
    devices = {parameter.device for parameter in model.parameters()}
    states = [RandomState(device) for device in devices]
    existing = [*model.parameters(), *model.buffers(), *inputs.values()]
    small = _small_parameters(model)
    dims: list[int] = []

    def peak(n: int) -> int:
        def run() -> None:
            outputs = embed(model, {name: values[:n] for name, values in inputs.items()})
            total = sum(output.float().sum() for output in outputs if output.requires_grad)
            torch.autograd.grad(total, small, allow_unused=True)
            dims.append(outputs[0].shape[-1])

        return count_peak(run, existing)

    large = peak(num_pairs)
    half = peak(num_pairs // 2) if num_pairs > 1 else 0
    for buffer, before in zip(model.buffers(), buffers):
        buffer.copy_(before)
    for state in states:
        state.restore()
    per_pair = max(1.0, (large - half) / (num_pairs - num_pairs // 2))
    of_inputs = sum(values.numel() * values.element_size() for values in inputs.values()) / num_pairs
    return PairMemory(per_pair, max(0.0, large - num_pairs * per_pair), of_inputs, dims[0])


def _small_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Biases, norms and adapters. Their backward pass goes through every layer, but makes no gradients as large as the
    weights, which would outweigh the activations of a few pairs."""
    room = sum(p.numel() for p in model.parameters()) // 64
    small: list[torch.nn.Parameter] = []
    for parameter in sorted((p for p in model.parameters() if p.requires_grad), key=torch.Tensor.numel):
        room -= parameter.numel()
        if room >= 0 or parameter.ndim <= 1 or not small:
            small.append(parameter)
    return small


def fixed_memory(
    model: torch.nn.Module, device: torch.device, pair: PairMemory, local_pairs: int, all_pairs: int
) -> float:
    """Bytes that a GradCache step takes with any chunk size: weights, gradients, AdamW's state and
    DistributedDataParallel's buckets as far as they aren't allocated yet, the batch, its embeddings, and the loss's
    copies of them."""
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    absent = sum(p.numel() * p.element_size() for p in model.parameters() if p.device.type != device.type)
    buckets = trained if all_pairs > local_pairs else 0
    # three modalities in float32: gathered, their gradient, and one copy of each
    embeds = 3 * 4 * pair.dim * 4 * all_pairs
    return absent + 3 * trained + buckets + pair.constant + pair.inputs * local_pairs + embeds


def chunk_that_fits(budget: float, fixed: float, per_pair: float) -> int:
    """The largest number of pairs that fits, a power of two and at most `LARGEST_CHUNK`; 0 if no pair fits. A pair
    takes `per_pair` bytes, and `fixed` of the `budget` bytes are already taken."""
    pairs = int((budget - fixed) / per_pair) if budget > fixed else 0
    return min(LARGEST_CHUNK, 1 << (pairs.bit_length() - 1)) if pairs else 0


def fit_chunk(
    embed: Callable[..., tuple],
    model: torch.nn.Module,
    inputs: dict[str, torch.Tensor],
    device: torch.device,
    all_pairs: int,
    exchange: Callable[[int], list[int]],
) -> int:
    """
    The largest number of pairs, a power of two, that every process can embed at a time.

    Args:
        embed (`Callable`), exchange (`Callable`): see `GradCache`.
        model, inputs: see `measure_pair_memory`; the inputs may be on any device.
        device: the device of the training.
        all_pairs: pairs of an optimiser step over all processes.

    Raises:
        ValueError: on all processes, if no pair fits on one of them.
    """
    here = next(model.parameters()).device
    pair = measure_pair_memory(embed, model, {name: values.to(here) for name, values in inputs.items()})
    processes = len(exchange(0))
    fixed = fixed_memory(model, device, pair, all_pairs // processes, all_pairs)
    available = available_memory(device)
    fits = exchange(chunk_that_fits(USABLE_SHARE * available, fixed, pair.per_pair))
    if min(fits) == 0:
        raise ValueError(
            f"training.effective_batch_size {all_pairs} does not fit on rank {fits.index(0)}: one pair takes "
            f"{pair.per_pair / 2**20:.1f} MiB, the batch, its embeddings and the optimiser {fixed / 2**20:,.0f} MiB; "
            f"{available / 2**20:,.0f} MiB are free here, of which {USABLE_SHARE:.0%} can be used. Lower it, use more "
            "processes, or free memory"
        )
    return min(fits)
