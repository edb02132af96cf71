"""What training processes tell each other: a contrastive batch they share, and evaluation shared out by rows.

Notable features:
- embeddings are gathered, then sums of exponentials; no gradient is communicated (`modeling_gcl.logsumexp`);
- before any tensor travels, processes agree: an error on one, or arguments that differ, is an error on all of them;
- processes need not hold equally many rows.
"""

import zlib

import torch
import torch.distributed as dist

# torch 2.13 renames it, and warns of the old name
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


def world_size():
    """Number of training processes; 1 when `torch.distributed` is not initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class Processes:
    """
    The processes of `torch.distributed` as sharers of a contrastive batch: pass it to a loss of `modeling_gcl.loss`
    as `processes`. Its methods are collective: every process must call them, in the same order.

    Args:
        device (`torch.device` or `str`): where embeddings lie; with NCCL the process's own GPU.
        half_ring (`bool`): blocks of rows pass from process to process instead of being gathered by all, and each two
            processes compute the similarities between them once. Memory O(N·D / size) instead of O(N·D) and 2/3 of the
            arithmetic, but each step waits for a neighbour, and rows of the gradient travel too.

    Example:
        >>> loss = gcl_loss(image_embeds, text_embeds, fused_embeds, logit_scale, processes=Processes("cpu"))
    """

    def __init__(self, device="cpu", half_ring=False):
        self.device, self.half_ring = torch.device(device), half_ring

    @property
    def size(self):
        """Number of processes."""
        return world_size()

    @property
    def rank(self):
        """Which of them this is."""
        return dist.get_rank() if self.size > 1 else 0

    def agree(self, num_rows, settings, error=None):
        """
        Tell the others how many rows this process has and what must be the same everywhere, or what is wrong.

        Args:
            num_rows (`int`): rows on this process.
            settings (`dict`): of values with the same `repr` on all processes; None with an error.
            error (`Exception`, *optional*): made from one message; raised by all processes.

        Returns:
            `list[int]`: rows of each process.

        Raises:
            Exception: `error`, or that of the first process that has one, with its rank.
            ValueError: settings differ; names the first that does and its values.
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
            self._raise_the_same(settings, error)
        return sizes

    def _raise_the_same(self, settings, error):
        told = [None] * self.size
        dist.all_gather_object(told, (error, settings))
        for rank, (theirs, _) in enumerate(told):
            if theirs is not None:
                raise type(theirs)(f"process {rank} of {self.size}: {theirs}") from error
        for name, value in settings.items():
            values = [theirs.get(name) for _, theirs in told]
            if any(repr(other) != repr(value) for other in values):
                raise ValueError(f"processes must agree on {name}; from process 0 on they have {values}")
        raise ValueError(f"processes must agree on their settings; from process 0 on they have {told}")

    def start_gather(self, tensors, sizes):
        """
        Begin to join rows over all processes, in rank order.

        Args:
            tensors (sequence of `torch.Tensor` of shape `(n, ...)`): alike on all processes but for n.
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
            jobs.append((_all_gather(joined[-1], x, async_op=True), x))  # x lives until it has been sent

        def wait():
            for job, _ in jobs:
                job.wait()
            if min(sizes) == longest:
                return joined
            return [torch.cat([part[:n] for part, n in zip(x.split(longest), sizes)]) for x in joined]

        return wait

    def start_shift(self, tensors, distance, num_rows):
        """
        Begin to send rows around the ring of processes.

        Args:
            tensors (sequence of `torch.Tensor` of shape `(n, ...)`): sent to process rank + distance.
            distance (`int`): may be negative.
            num_rows (`int`): rows that process rank − distance sends here.

        Returns:
            a function that waits and returns the `list[torch.Tensor]` of shape `(num_rows, ...)` received.
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

        def wait():
            for handle in handles:
                handle.wait()
            sent.clear()
            return received

        return wait


class RowShardedEncoder:
    """A model whose `encode` embeds every `world_size`-th row on each rank and gathers the result on all of them."""

    def __init__(self, model):
        self.model = model

    def encode(self, rows, **kwargs):
        """As `GCLModel.encode` with `on_error="raise"`; every rank must call it with the same rows."""
        if world_size() == 1:
            return self.model.encode(rows, **kwargs)
        rank, size = dist.get_rank(), world_size()
        kwargs["show_progress"] = kwargs.get("show_progress", False) and rank == 0
        try:
            shard = self.model.encode([rows[i] for i in range(rank, len(rows), size)], **kwargs)
        except Exception as error:  # reported to all ranks: one that raised alone would leave the others waiting
            shard = error
        shards = [None] * size
        dist.all_gather_object(shards, shard)
        for shard in shards:
            if isinstance(shard, Exception):
                raise shard
        embeds = shards[0].new_empty(len(rows), shards[0].shape[1])
        for start, shard in enumerate(shards):
            embeds[start::size] = shard
        return embeds
