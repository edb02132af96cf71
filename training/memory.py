"""How much memory there is, and how much an embedded pair takes: counted, on any device, on a handful of pairs."""

import os
import sys
import weakref
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from accelerate.utils.memory import clear_device_cache
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from universal_gcl.training.random_state import RandomState

# of the memory at hand: the rest is for what operators take within themselves, fragments and the loss's tiles
USABLE_SHARE = 0.8
LARGEST_CHUNK = 4096  # a larger one is no faster
CGROUP = Path("/sys/fs/cgroup")


class AllocationCounter(TorchDispatchMode):
    """Inside, counts the bytes of tensors made and still alive, in forward and backward; `peak` is their maximum.

    What an operator allocates and frees within itself is not seen.
    """

    def __init__(self):
        super().__init__()
        self.peak = 0
        self._live = 0
        self._storages: dict[int, int] = {}

    def ignore(self, tensor: torch.Tensor):
        """Don't count a tensor that was there before, when an operator returns a view of it."""
        self._storages.setdefault(tensor.untyped_storage().data_ptr(), 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self._count(value.untyped_storage())
        return result

    def _count(self, storage):
        address, size = storage.data_ptr(), storage.nbytes()
        if size == 0 or address in self._storages:
            return
        self._storages[address] = size
        self._live += size
        self.peak = max(self.peak, self._live)
        weakref.finalize(storage, self._forget, address)

    def _forget(self, address):
        self._live -= self._storages.pop(address)


def count_peak(run, existing) -> int:
    """Most bytes alive at once in `run()`, beyond the tensors in `existing`."""
    counter = AllocationCounter()
    for tensor in existing:
        counter.ignore(tensor)
    with counter:
        run()
    return counter.peak


def available_memory(device: torch.device) -> int:
    """Bytes that this process may still take on `device`. On the CPU the processes of a machine share them alike, and
    a container's limit counts."""
    module = None if device.type == "cpu" else torch.get_device_module(device)
    if hasattr(module, "mem_get_info"):
        clear_device_cache()
        return module.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        if limit != "max":
            free = min(free, int(limit) - int((CGROUP / "memory.current").read_text()))
    except OSError:  # no container, or the older kind
        pass
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has held so far: of tensors on a GPU, else in its resident memory."""
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
    """Bytes of forward and backward on n pairs at once: `constant + n * per_pair`, beside the parameters' gradients.
    `inputs` bytes of a pair are the model's inputs, `dim` is the width of its embeddings."""

    per_pair: float
    constant: float
    inputs: float
    dim: int


def measure_pair_memory(embed, model, inputs: dict) -> PairMemory:
    """
    Embed few pairs, with gradient, at two sizes of the batch; leaves the model and the random numbers as they were.

    Args:
        embed (`Callable`): as for `GradCache`.
        model (`torch.nn.Module`): in the mode that it trains in.
        inputs (`dict[str, torch.Tensor]`): of at least one pair, on the model's device.
    """
    num_pairs = len(next(iter(inputs.values())))
    buffers = [buffer.clone() for buffer in model.buffers()]
    devices = {parameter.device for parameter in model.parameters()}
    states = [RandomState(device) for device in devices]
    existing = [*model.parameters(), *model.buffers(), *inputs.values()]
    small = _small_parameters(model)
    dims = []

    def peak(n):
        def run():
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


def _small_parameters(model):
    """Biases, norms and adapters: going back to them passes every layer, but makes no gradient as large as a weight,
    which on few pairs would outweigh the activations that are to be counted."""
    room = sum(p.numel() for p in model.parameters()) // 64
    small = []
    for parameter in sorted((p for p in model.parameters() if p.requires_grad), key=torch.Tensor.numel):
        room -= parameter.numel()
        if room >= 0 or parameter.ndim <= 1 or not small:
            small.append(parameter)
    return small


def fixed_memory(model, device: torch.device, pair: PairMemory, local_pairs: int, all_pairs: int) -> float:
    """Bytes that a GradCache step takes whatever the chunk: what is not allocated yet of weights, gradients, AdamW's
    state and DistributedDataParallel's buckets, the batch itself, its embeddings and what the loss makes of them."""
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    absent = sum(p.numel() * p.element_size() for p in model.parameters() if p.device.type != device.type)
    buckets = trained if all_pairs > local_pairs else 0
    # three modalities in float32: gathered, their gradient, and one copy of each
    embeds = 3 * 4 * pair.dim * 4 * all_pairs
    return absent + 3 * trained + buckets + pair.constant + pair.inputs * local_pairs + embeds


def chunk_that_fits(budget: float, fixed: float, per_pair: float) -> int:
    """The largest power of two of pairs, each of `per_pair` bytes, for which `budget` bytes suffice beside `fixed`
    ones; 0 if not even one pair fits, at most `LARGEST_CHUNK`."""
    pairs = int((budget - fixed) / per_pair) if budget > fixed else 0
    return min(LARGEST_CHUNK, 1 << (pairs.bit_length() - 1)) if pairs else 0


def fit_chunk(embed, model, inputs: dict, device: torch.device, all_pairs: int, exchange) -> int:
    """
    The largest power of two of pairs that may be embedded at once on every process.

    Args:
        embed (`Callable`), exchange (`Callable`): as for `GradCache`.
        model, inputs: as for `measure_pair_memory`, but the inputs on any device.
        device: where training will be.
        all_pairs: pairs of an optimiser step over all processes.

    Raises:
        ValueError: on all processes, when on one of them not a single pair fits.
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
            f"{available / 2**20:,.0f} MiB are free here, {USABLE_SHARE:.0%} of which may be used. Lower it, use more "
            "processes, or free memory"
        )
    return min(fits)
