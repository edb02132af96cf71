"""GradCache (Gao et al., arXiv 2101.06983): a contrastive batch of any size in the memory of one chunk.

1. Embed the chunks without a graph; only the last one keeps its graph.
2. Compute the loss of the whole batch on detached copies of the embeddings and the scale, and its gradient with respect
   to them.
3. Embed each chunk again, with a graph and the same random numbers, and backpropagate Σ⟨embeddings, gradient⟩.

Notable features:
- the gradient is that of the whole batch: the chunk size changes it by rounding only;
- a batch of one chunk is embedded once, so the plain step is the same code;
- dropout is replayed bit by bit; the scale is a leaf like the embeddings; outputs without a gradient are skipped;
- parameters that the loss itself depends on (a learned bias, regularised weights) get their gradient too; if nothing
  trains such a parameter, that is an error;
- if memory runs out once, all processes halve the chunk size and repeat the batch.
"""

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import nn

from universal_gcl.training.chunks import Chunk, split_batch
from universal_gcl.training.random_state import RandomState

logger = logging.getLogger(__name__)

Gradients = Sequence[torch.Tensor | None]


class GradCache:
    """
    Args:
        embed (`Callable`): `embed(model, inputs)` returns a tuple: embeddings, each of shape `(n, D)`, and then the
            scale. It is called with and without a graph, and must enter autocast itself, the same way in both cases.
        loss (`Callable`): `loss(embeds, scale, labels)` returns the scalar loss of the whole batch, and anything else
            that `step` is to return (the terms). Only the loss may exchange tensors between processes.
        backward (`Callable`): `backward(scalar)` adds to the parameters' gradients, with fp16's loss scale if needed.
        device (`torch.device`): where the model is; its random numbers are replayed.
        chunk_size (`int`, *optional*): the most pairs embedded at a time. By default a step is one chunk, and running
            out of memory is not handled.
        no_sync (`Callable`): `no_sync(model)` is a context in which backward does not communicate.
        exchange (`Callable`): `exchange(number)` returns the numbers of all processes as a list, in rank order.
        sharded (`bool`): whether embedding communicates (FSDP), so that a process can't repeat a step on its own.
        trim_texts (`bool`): whether columns of padding may be cut off chunks; see `split_batch`.
        measure (`Callable`): `measure("encoder")` and `measure("loss")` are contexts around these parts of a step.
        loss_parameters (sequence of `nn.Parameter`): trained parameters that belong to the loss and not to the model.
    """

    def __init__(
        self,
        embed: Callable[..., tuple],
        loss: Callable[..., tuple[torch.Tensor, Any]],
        backward: Callable[[torch.Tensor], Any],
        *,
        device: torch.device,
        chunk_size: int | None = None,
        no_sync: Callable[..., AbstractContextManager] = lambda model: nullcontext(),
        exchange: Callable[[int], list[int]] = lambda number: [number],
        sharded: bool = False,
        trim_texts: bool = True,
        measure: Callable[[str], AbstractContextManager] = lambda part: nullcontext(),
        loss_parameters: Sequence[nn.Parameter] = (),
    ) -> None:
        self.embed, self.loss, self.backward = embed, loss, backward
        self.device = device
        self.chunk_size = chunk_size
        self.no_sync, self.exchange, self.sharded, self.measure = no_sync, exchange, sharded, measure
        self.trim_texts = trim_texts
        self.loss_parameters = list(loss_parameters)
        self.num_processes = 1
        self.halved = False

    def step(self, model: nn.Module, micro_batches: Sequence[tuple[dict, dict]]) -> tuple[torch.Tensor, Any]:
        """
        Add the gradient of one contrastive batch to the parameters' gradients. With a chunk size, there must be no
        gradients yet.

        Args:
            model: what `embed` calls.
            micro_batches: the inputs (name to tensor) and labels (name to tensor of shape `(n,)`) of each micro-batch.
                All tensors have one row per pair.

        Returns:
            The loss, detached, and the terms.

        Raises:
            ValueError: the processes hold different numbers of chunks, or the loss depends on a parameter that can't be
                trained.
            MemoryError: memory ran out for the second time, or at a point from which the processes can't repeat the
                step together.
        """
        start = RandomState(self.device)
        try:
            return self._attempt(model, self._chunks(micro_batches))
        except _MemoryShortage as error:
            shortage, chunk_size = str(error), error.chunk_size
        # outside the handler, where nothing holds the frames of the failed attempt any more
        model.zero_grad()
        for parameter in self.loss_parameters:
            parameter.grad = None
        gc.collect()
        clear_device_cache()
        self.halved = True
        self.chunk_size = chunk_size // 2
        logger.warning(
            f"Out of memory ({shortage}). This step is repeated, and training goes on, with grad_cache_chunk "
            f"{self.chunk_size} instead of {chunk_size}."
        )
        start.restore()
        return self._attempt(model, self._chunks(micro_batches))

    def _chunks(self, micro_batches: Sequence[tuple[dict, dict]]) -> list[Chunk]:
        chunks = [chunk for batch in micro_batches for chunk in split_batch(*batch, self.chunk_size, self.trim_texts)]
        if self.chunk_size is not None:
            counts = self.exchange(len(chunks))
            self.num_processes = len(counts)
            if len(set(counts)) > 1:
                raise ValueError(
                    f"the processes hold different numbers of chunks in this step, {counts} in rank order, but need "
                    "the same number: set dataloader_drop_last: true and one per_device_train_batch_size for all"
                )
        return chunks

    def _attempt(self, model: nn.Module, chunks: list[Chunk]) -> tuple[torch.Tensor, Any]:
        cached: list[tuple] = []
        states: list[RandomState] = []
        with self._surviving(), self.measure("encoder"):
            for chunk in chunks[:-1]:
                states.append(RandomState(self.device))
                with torch.no_grad():
                    cached.append(self.embed(model, chunk.inputs()))
            inputs = chunks[-1].inputs()
        # DistributedDataParallel rebuilds its buckets once, on all processes together, when a forward pass with a graph
        # begins: no process may have stopped before that
        with self._surviving(), self.measure("encoder"):
            with self.no_sync(model) if cached else nullcontext():
                kept = [self.embed(model, inputs)]
        del inputs
        cached.append(tuple(output.detach() for output in kept[0]))

        with self._surviving(waiting=True), self.measure("loss"):
            needed = [output.requires_grad for output in kept[0]]
            labels = {name: torch.cat([chunk.labels[name] for chunk in chunks]) for name in chunks[0].labels}
            loss, terms, gradients, of_parameters = self._loss_and_gradients(model, cached, needed, labels)
        end = RandomState(self.device)

        def add_gradient(index: int, last: bool) -> None:
            if index < len(states):
                states[index].restore()
                outputs = self.embed(model, chunks[index].inputs())
            else:
                outputs = kept.pop()
            *of_embeds, of_scale = gradients[index]
            # DistributedDataParallel waits for every parameter, so the scale takes part every time: once with its
            # gradient, otherwise with 0
            if of_scale is not None and not last:
                of_scale = torch.zeros_like(of_scale)
            parameters = of_parameters if last else []
            tensors = [*outputs, *(parameter for parameter, _ in parameters)]
            self.backward(inner_product(tensors, [*of_embeds, of_scale, *(gradient for _, gradient in parameters)]))

        # the kept graph goes first: its memory is free when the next chunk needs it
        *early, final = [len(states), *range(len(states))]
        if not any(needed):  # nothing in the model is trained, only parameters of the loss: one chunk carries them
            early, final = [], len(states)
        with self._surviving(), self.measure("encoder"):
            for index in early:
                with self.no_sync(model):
                    add_gradient(index, last=False)
        with self._surviving(waiting=True), self.measure("encoder"):
            add_gradient(final, last=True)
        end.restore()
        return loss, terms

    def _loss_and_gradients(
        self, model: nn.Module, cached: list[tuple], needed: list[bool], labels: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, Any, list[Gradients], list[tuple[torch.Tensor, torch.Tensor]]]:
        """The loss, the terms, the gradient with respect to each chunk's outputs (None for those without one), and the
        parameters that the loss depends on directly, each with its gradient."""
        *embeds, scale = zip(*cached)
        leaves = [full_precision(torch.cat(parts)) for parts in embeds] + [full_precision(scale[-1].clone())]
        wanted = [leaf.requires_grad_() for leaf, need in zip(leaves, needed) if need]
        loss, terms = self.loss(leaves[:-1], leaves[-1], labels)
        parameters = self._parameters(model, loss, leaves)
        # zeros for an output that the loss does not use: DistributedDataParallel waits for every parameter
        found: Iterator = iter(torch.autograd.grad(loss, [*wanted, *parameters], materialize_grads=True))
        gradients: list[torch.Tensor | None] = [next(found) if need else None for need in needed]
        sizes = [len(outputs[0]) for outputs in cached]
        columns = [
            [gradient] * len(sizes) if gradient is None or gradient.ndim == 0 else gradient.split(sizes)
            for gradient in gradients
        ]
        return loss.detach(), terms, list(zip(*columns)), list(zip(parameters, found))

    def _parameters(self, model: nn.Module, loss: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
        """What the loss was computed from, in addition to its leaves: parameters of the model and of the loss
        itself."""
        cached = {id(leaf) for leaf in leaves}
        reached = [tensor for tensor in graph_leaves(loss) if id(tensor) not in cached]
        if not reached:
            return []
        of_model, of_loss = ({id(p) for p in owned} for owned in (model.parameters(), self.loss_parameters))
        for tensor in reached:
            if id(tensor) not in of_model | of_loss:
                raise ValueError(
                    f"compute_loss depends on a tensor of shape {tuple(tensor.shape)} that requires a gradient, but is "
                    "not trained: pass the module that owns it as GCLTrainer(loss=...), or detach it"
                )
            if self.sharded and id(tensor) in of_model:
                raise ValueError(
                    "compute_loss depends on weights of the model, which FSDP2 shards: use the embeddings and "
                    "logit_scale that it is given, or DDP (hub_configs/accelerate/eight_gpus.yaml)"
                )
        return reached

    @contextmanager
    def _surviving(self, waiting: bool = False) -> Iterator[None]:
        """A context in which memory may run out. At its end all processes learn about it and stop together, to try
        again.

        Where processes wait for each other inside the context (`waiting`, or a sharded model), only a process that is
        alone can try again.
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
                raise MemoryError(f"while the processes exchange data: {shortage}. {self._advice(self.chunk_size)}")
            return
        short = [rank for rank, flag in enumerate(self.exchange(int(shortage is not None))) if flag]
        if short:
            shortage = shortage or f"on rank {short[0]}"
            if self.halved or self.chunk_size == 1:
                raise MemoryError(
                    f"{shortage}, with chunks of {self.chunk_size} pairs. {self._advice(self.chunk_size)}"
                )
            raise _MemoryShortage(shortage, self.chunk_size)

    @staticmethod
    def _advice(chunk_size: int) -> str:
        chunk = f"grad_cache_chunk (to {chunk_size // 2}), " if chunk_size > 1 else ""
        return (
            f"Lower {chunk}the pairs per step or data.max_text_length, use bf16, or turn activation checkpointing on; "
            "then resume from the last checkpoint"
        )


class _MemoryShortage(Exception):
    """Memory ran out on some process, and all of them are about to repeat the step."""

    def __init__(self, message: str, chunk_size: int) -> None:
        super().__init__(message)
        self.chunk_size = chunk_size


def full_precision(values: torch.Tensor) -> torch.Tensor:
    """`values` in float32, or in float64 if they are float64."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def inner_product(tensors: Sequence[torch.Tensor], gradients: Gradients) -> torch.Tensor:
    """Σ⟨tensor, gradient⟩ in the gradients' precision, over the tensors that need a gradient and have one."""
    pairs = [(x, gradient) for x, gradient in zip(tensors, gradients) if x.requires_grad and gradient is not None]
    return torch.stack([(x.to(gradient.dtype) * gradient).sum() for x, gradient in pairs]).sum()


def graph_leaves(output: torch.Tensor) -> list[torch.Tensor]:
    """The tensors at the ends of the graph of `output`: those that a backward pass would give a gradient."""
    leaves, seen, nodes = [], set(), [output.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):  # an AccumulateGrad
            leaves.append(node.variable)
        nodes.extend(following for following, _ in node.next_functions)
    return leaves


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed, on an accelerator or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)
