"""Embeddings across processes: the gather whose gradient is right, and evaluation shared out by rows."""

import torch
import torch.distributed as dist


def world_size():
    """Number of training processes; 1 when `torch.distributed` is not initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _GatherRows(torch.autograd.Function):
    """All ranks' rows, in rank order. Every rank then computes the same loss L on the whole batch.

    Backward: rank r's slice of dL/d(rows), times the number of ranks. DistributedDataParallel averages parameter
    gradients over ranks; the factor makes that average the sum over ranks that the whole-batch gradient is, without
    touching the temperature, whose gradient each rank already holds in full.
    """

    @staticmethod
    def forward(ctx, rows):
        gathered = [torch.empty_like(rows) for _ in range(world_size())]
        dist.all_gather(gathered, rows.contiguous())
        ctx.num_rows = len(rows)
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx, gradient):
        start = dist.get_rank() * ctx.num_rows
        return gradient[start : start + ctx.num_rows] * world_size()


def gather_rows(rows):
    """
    Concatenate a tensor over all processes along dimension 0, in rank order, differentiably.

    Args:
        rows (`torch.Tensor` of shape `(n, ...)`, or None): the same shape on every rank.

    Returns:
        `torch.Tensor` of shape `(n · world_size, ...)`; `rows` itself on one process; None for None.
    """
    if rows is None or world_size() == 1:
        return rows
    return _GatherRows.apply(rows)


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
