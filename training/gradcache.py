"""GradCache (Gao et al., arXiv 2101.06983): a contrastive batch of any size in the memory of one chunk.

1. Embed the chunks without a graph; only the last one keeps its graph.
2. The loss of the whole batch, and its gradient by the embeddings and the scale, on detached copies of them.
3. Embed each chunk again, with a graph and the random numbers it had, and go back from Σ⟨embeddings, gradient⟩.

Notable features:
- the gradient is that of the whole batch: it depends on the chunk size by rounding alone;
- a batch of one chunk is embedded once, so the plain step is the same code;
- dropout is replayed bit by bit; the scale is a leaf like the embeddings; what has no gradient is left out;
- one shortage of memory is survived: the chunk is halved, on all processes, and the batch done again.
"""

import gc
import logging
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import nn

from universal_gcl.training.chunks import split_batch
from universal_gcl.training.random_state import RandomState

logger = logging.getLogger(__name__)


class GradCache:
    """
    Args:
        embed (`Callable`): `embed(model, inputs)` gives a tuple: embeddings, each of shape `(n, D)`, and last the
            scale. Called with a graph and without one; autocast must be entered inside, alike in both cases.
        loss (`Callable`): `loss(embeds, scale, labels)` of the whole batch gives the scalar loss and whatever else is
            to be handed through (the terms). The one part that may join processes.
        backward (`Callable`): `backward(scalar)` adds to the parameters' gradients, with an fp16 loss scale if need be.
        device (`torch.device`): where the model is, whose random numbers are replayed.
        chunk_size (`int`, *optional*): most pairs embedded at once. By default a step is one chunk, and a shortage of
            memory is nobody's business here.
        no_sync (`Callable`): `no_sync(model)` is a context in which backward does not communicate.
        exchange (`Callable`): `exchange(number)` gives the numbers of all processes as a list, in rank order.
        sharded (`bool`): whether embedding communicates (FSDP), so that a process can't go back on its own.
        trim_texts (`bool`): whether chunks may lose columns of padding, as `split_batch` says.
        measure (`Callable`): `measure("encoder")` and `measure("loss")` are contexts around these parts of a step.
    """

    def __init__(
        self,
        embed: Callable,
        loss: Callable,
        backward: Callable,
        *,
        device: torch.device,
        chunk_size: int | None = None,
        no_sync: Callable = lambda model: nullcontext(),
        exchange: Callable = lambda number: [number],
        sharded: bool = False,
        trim_texts: bool = True,
        measure: Callable = lambda part: nullcontext(),
    ):
        self.embed, self.loss, self.backward = embed, loss, backward
        self.device = device
        self.chunk_size = chunk_size
        self.no_sync, self.exchange, self.sharded, self.measure = no_sync, exchange, sharded, measure
        self.trim_texts = trim_texts
        self.num_processes = 1
        self.halved = False

    def step(self, model: nn.Module, micro_batches: Sequence[tuple[dict, dict]]):
        """
        Add the gradient of one contrastive batch to the parameters' gradients, which must be empty before if there is
        a chunk size.

        Args:
            model: what `embed` calls.
            micro_batches: of each the inputs (name to tensor) and the labels (name to tensor of shape `(n,)`). All
                tensors have one row per pair.

        Returns:
            The loss, detached, and the terms.

        Raises:
            ValueError: the processes hold different numbers of chunks.
            MemoryError: memory ran out for the second time, or where the processes can't go back together.
        """
        start = RandomState(self.device)
        try:
            return self._attempt(model, self._chunks(micro_batches))
        except _MemoryShortage as error:
            shortage = str(error)
        # out of the handler, where nothing holds the frames of the failed attempt any more
        model.zero_grad()
        gc.collect()
        clear_device_cache()
        self.halved, chunk_size = True, self.chunk_size
        self.chunk_size = chunk_size // 2
        logger.warning(
            f"Out of memory ({shortage}): this step is repeated, and training goes on, with grad_cache_chunk "
            f"{self.chunk_size} instead of {chunk_size}."
        )
        start.restore()
        return self._attempt(model, self._chunks(micro_batches))

    def _chunks(self, micro_batches):
        chunks = [chunk for batch in micro_batches for chunk in split_batch(*batch, self.chunk_size, self.trim_texts)]
        if self.chunk_size is not None:
            counts = self.exchange(len(chunks))
            self.num_processes = len(counts)
            if len(set(counts)) > 1:
                raise ValueError(
                    f"the processes hold different numbers of chunks for this step, {counts} in rank order; they need "
                    "equally many pairs: set dataloader_drop_last: true and one per_device_train_batch_size for all"
                )
        return chunks

    def _attempt(self, model, chunks):
        cached, states = [], []
        with self._surviving(), self.measure("encoder"):
            for chunk in chunks[:-1]:
                states.append(RandomState(self.device))
                with torch.no_grad():
                    cached.append(self.embed(model, chunk.inputs()))
            inputs = chunks[-1].inputs()
        # DistributedDataParallel rebuilds its buckets, together, once, when a forward pass with a graph begins: no
        # process may have stopped before that
        with self._surviving(), self.measure("encoder"):
            with self.no_sync(model) if cached else nullcontext():
                kept = [self.embed(model, inputs)]
        del inputs
        cached.append(tuple(output.detach() for output in kept[0]))
        end = RandomState(self.device)

        with self._surviving(waiting=True), self.measure("loss"):
            needed = [output.requires_grad for output in kept[0]]
            labels = {name: torch.cat([chunk.labels[name] for chunk in chunks]) for name in chunks[0].labels}
            loss, terms, gradients = self._loss_and_gradients(cached, needed, labels)

        def add_gradient(index, scale_share):
            if index < len(states):
                states[index].restore()
                outputs = self.embed(model, chunks[index].inputs())
            else:
                outputs = kept.pop()
            *of_embeds, of_scale = gradients[index]
            # DistributedDataParallel waits for every parameter: the scale takes part with 0, and once with 1
            of_scale = None if of_scale is None else of_scale * scale_share
            self.backward(inner_product(outputs, [*of_embeds, of_scale]))

        # the kept graph goes first: its memory is free when the next chunk needs it
        *early, final = [len(states), *range(len(states))]
        with self._surviving(), self.measure("encoder"):
            for index in early:
                with self.no_sync(model):
                    add_gradient(index, 0.0)
        with self._surviving(waiting=True), self.measure("encoder"):
            add_gradient(final, 1.0)
        end.restore()
        return loss, terms

    def _loss_and_gradients(self, cached, needed, labels):
        """The loss, the terms, and for each chunk the loss's gradient by its outputs, None for those without one."""
        *embeds, scale = zip(*cached)
        leaves = [full_precision(torch.cat(parts)) for parts in embeds] + [full_precision(scale[-1].clone())]
        wanted = [leaf.requires_grad_() for leaf, need in zip(leaves, needed) if need]
        loss, terms = self.loss(leaves[:-1], leaves[-1], labels)
        found = iter(torch.autograd.grad(loss, wanted, allow_unused=True))
        gradients = [next(found) if need else None for need in needed]
        sizes = [len(outputs[0]) for outputs in cached]
        columns = [
            [gradient] * len(sizes) if gradient is None or gradient.ndim == 0 else gradient.split(sizes)
            for gradient in gradients
        ]
        return loss.detach(), terms, list(zip(*columns))

    @contextmanager
    def _surviving(self, waiting=False):
        """Inside, memory may run out: at the end all processes learn of it and stop together, to try again.

        Not where processes wait for each other inside (`waiting`, or a sharded model): only one that is alone can go
        back then.
        """
        if self.chunk_size is None:
            yield
            return
        shortage = None
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            shortage = str(error) or "out of memory"
        if self.num_processes > 1 and (waiting or self.sharded):
            if shortage:
                raise MemoryError(f"while the processes exchange data: {shortage}. {self._advice()}")
            return
        short = [rank for rank, flag in enumerate(self.exchange(int(shortage is not None))) if flag]
        if short:
            shortage = shortage or f"on rank {short[0]}"
            if self.halved or self.chunk_size == 1:
                raise MemoryError(f"{shortage}, with chunks of {self.chunk_size} pairs. {self._advice()}")
            raise _MemoryShortage(shortage)

    def _advice(self):
        chunk = f"grad_cache_chunk (to {self.chunk_size // 2}), " if self.chunk_size > 1 else ""
        return (
            f"Lower {chunk}the pairs per step or data.max_text_length, use bf16, or turn activation checkpointing on; "
            "then resume from the last checkpoint"
        )


class _MemoryShortage(Exception):
    """Memory ran out on some process, and all of them are about to do the step again."""


def full_precision(values):
    """`values` in float32, or as they are in float64."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def inner_product(outputs, gradients):
    """Σ⟨output, gradient⟩ in the gradients' precision, over the outputs that have a graph and a gradient."""
    pairs = [(o, g) for o, g in zip(outputs, gradients) if o.requires_grad and g is not None]
    return torch.stack([(output.to(gradient.dtype) * gradient).sum() for output, gradient in pairs]).sum()


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed, on an accelerator or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)
