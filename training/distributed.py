"""How training processes share one contrastive batch, and divide the rows of an evaluation.

Notable features:
- embeddings are gathered, then sums of exponentials; gradients are not communicated (`modeling_gcl.logsumexp`);
- before tensors are exchanged, the processes compare their arguments: an error on one process, or arguments that
  differ, raise the same error on all of them;
- processes may hold different numbers of rows.
"""

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from universal_gcl.retrieval.processes import gather_objects, own_rank, world_size

# torch 2.13 renames it, and warns about the old name
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


class BatchProcesses:
    """
    The processes of `torch.distributed` that share a contrastive batch: pass it to a loss of `modeling_gcl.loss` as
    `processes`. Its methods are collective: every process must call them, in the same order.

    Args:
        device (`torch.device` or `str`): where the embeddings are; with NCCL, the process's own GPU.
        half_ring (`bool`): blocks of rows are passed from process to process instead of being gathered on all, and the
            similarities between two processes are computed once, by one of them. Memory O(N·D / size) instead of O(N·D)
            and 2/3 of the arithmetic, but each step waits for a neighbour, and rows of the gradient are sent too.

    Example:
        >>> loss = gcl_loss(image_embeds, text_embeds, fused_embeds, logit_scale, processes=BatchProcesses("cpu"))
    """

    def __init__(self, device: torch.device | str = "cpu", half_ring: bool = False) -> None:
        self.device, self.half_ring = torch.device(device), half_ring

    @property
    def size(self) -> int:
        """Number of processes."""
        return world_size()

    @property
    def rank(self) -> int:
        """Number of this process, from 0."""
        return own_rank()

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """
        The rows of all processes, in rank order, with gradient: for losses that need the whole batch on each process.

        In the backward pass each process gets the gradient of its own rows, summed over the losses of all processes.
        Averaging parameter gradients over the processes then gives the gradient of the mean of these losses.

        Args:
            rows (`torch.Tensor` of shape `(n, ...)`): n may differ between the processes.

        Returns:
            `torch.Tensor` of shape `(N, ...)`, the same on all processes.
        """
        if self.size == 1:
            return rows
        sizes = self.agree(len(rows), {"row shape": tuple(rows.shape[1:]), "dtype": rows.dtype})
        return _Gather.apply(rows, self, sizes)

    def exchange(self, number: int) -> list[int]:
        """The integers of all processes, in rank order."""
        return self.agree(number, {})

    def agree(self, num_rows: int, settings: dict[str, Any] | None, error: Exception | None = None) -> list[int]:
        """
        Exchange the number of rows, and check that no process has an error and that all have the same settings.

        Args:
            num_rows (`int`): rows on this process.
            settings (`dict`): values that must have the same `repr` on all processes; None if there is an error.
            error (`Exception`, *optional*): what is wrong on this process. All processes raise it; its class must take
                one message.

        Returns:
            `list[int]`: rows of each process.

        Raises:
            Exception: `error`, or the error of the first process that has one, with its rank.
            ValueError: settings differ; the message names the first such setting and its values.
        """
        if self.size == 1:
            if error is not None:
                raise error
            return [num_rows]
        digest = 0 if error else zlib.crc32(repr(settings).encode())
        header = torch.tensor([error is not None, num_rows, digest], device=self.device)  # (3,) int64
        headers = header.new_empty(self.size * 3)
        _all_gather(headers, header)
        failed, sizes, digests = headers.view(self.size, 3).T.tolist()
        if any(failed) or len(set(digests)) > 1:
            self._raise_the_same(settings or {}, error)
        return sizes

    def _raise_the_same(self, settings: dict[str, Any], error: Exception | None) -> None:
        everywhere = gather_objects((error, settings))
        for rank, (theirs, _) in enumerate(everywhere):
            if theirs is not None:
                raise type(theirs)(f"process {rank} of {self.size}: {theirs}") from error
        for name, value in settings.items():
            values = [theirs.get(name) for _, theirs in everywhere]
            if any(repr(other) != repr(value) for other in values):
                raise ValueError(f"processes must agree on {name}; in rank order they have {values}")
        raise ValueError(f"processes must agree on their settings; in rank order they have {everywhere}")

    def start_gather(self, tensors: Sequence[torch.Tensor], sizes: list[int]) -> Callable[[], list[torch.Tensor]]:
        """
        Start to gather rows from all processes, in rank order.

        Args:
            tensors (sequence of `torch.Tensor` of shape `(n, ...)`): only n may differ between the processes.
            sizes (`list[int]`): n of each process.

        Returns:
            a function that waits and returns the `list[torch.Tensor]` of shape `(N, ...)`, without gradient.
        """
        if self.size == 1:
            return lambda: list(tensors)
        longest = max(sizes)
        jobs, joined = [], []
        for x in tensors:
            x = x.detach().contiguous()
            if len(x) < longest:  # a collective takes equal shares
                x = torch.cat([x, x.new_zeros(longest - len(x), *x.shape[1:])])
            joined.append(x.new_empty(self.size * longest, *x.shape[1:]))
            jobs.append((_all_gather(joined[-1], x, async_op=True), x))  # x must live until it has been sent

        def wait() -> list[torch.Tensor]:
            for job, _ in jobs:
                job.wait()
            if min(sizes) == longest:
                return joined
            return [torch.cat([part[:n] for part, n in zip(x.split(longest), sizes)]) for x in joined]

        return wait

    def start_shift(
        self, tensors: Sequence[torch.Tensor], distance: int, num_rows: int
    ) -> Callable[[], list[torch.Tensor]]:
        """
        Start to send rows around the ring of processes.

        Args:
            tensors (sequence of `torch.Tensor` of shape `(n, ...)`): sent to process rank + distance.
            distance (`int`): may be negative.
            num_rows (`int`): rows that process rank − distance sends to this one.

        Returns:
            a function that waits and returns the `list[torch.Tensor]` of shape `(num_rows, ...)` that arrived.
        """
        to, source = (self.rank + distance) % self.size, (self.rank - distance) % self.size
        sent = [x.detach().contiguous() for x in tensors]
        received = [x.new_empty(num_rows, *x.shape[1:]) for x in sent]
        jobs = [
            dist.P2POp(operation, x, peer, tag=tag)
            for operation, peer, batch in ((dist.isend, to, sent), (dist.irecv, source, received))
            for tag, x in enumerate(batch)
        ]
        handles = dist.batch_isend_irecv(jobs)

        def wait() -> list[torch.Tensor]:
            for handle in handles:
                handle.wait()
            sent.clear()
            return received

        return wait


class _Gather(torch.autograd.Function):
    """`BatchProcesses.gather`. torch's own gather functions with a gradient are deprecated."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, processes: BatchProcesses, sizes: list[int]) -> torch.Tensor:
        ctx.start, ctx.size = sum(sizes[: processes.rank]), sizes[processes.rank]
        return processes.start_gather([rows], sizes)()[0]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        gradient = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.narrow(0, ctx.start, ctx.size), None, None


class RowShardedEncoder:
    """A model whose `encode` embeds every `world_size`-th row on each rank and gathers the result on all of them."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def encode(self, rows: Sequence, processor: Any = None, **kwargs: Any) -> torch.Tensor:
        """The same as `GCLModel.encode` with `on_error="raise"`; every rank must call it with the same rows."""
        if world_size() == 1:
            return self.model.encode(rows, processor, **kwargs)
        rank, size = own_rank(), world_size()
        kwargs["show_progress"] = kwargs.get("show_progress", False) and rank == 0
        try:
            shard = self.model.encode([rows[i] for i in range(rank, len(rows), size)], processor, **kwargs)
        except Exception as error:  # sent to all ranks: if one rank alone raised, the others would wait for it
            shard = error
        shards = gather_objects(shard)
        for shard in shards:
            if isinstance(shard, Exception):
                raise shard
        embeds = shards[0].new_empty(len(rows), shards[0].shape[1])
        for start, shard in enumerate(shards):
            embeds[start::size] = shard
        return embeds
