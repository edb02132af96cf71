"""How a contrastive batch is made up: micro-batches, processes and chunks, and the negatives that come of it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class BatchPlan:
    """
    Args:
        micro_batch: pairs that one process loads at once.
        accumulation: micro-batches of one optimiser step.
        processes: number of processes.
        chunk: pairs embedded at once; None without GradCache.
        negatives: embeddings of other pairs that each query is compared with.
        chunk_that_fits: the largest chunk that memory holds, if that was measured.
    """

    micro_batch: int
    accumulation: int
    processes: int
    chunk: int | None
    negatives: int
    chunk_that_fits: int | None = None

    @property
    def pairs(self) -> int:
        """Pairs of one optimiser step over all processes."""
        return self.micro_batch * self.accumulation * self.processes

    def line(self) -> str:
        """One line for the log."""
        text = (
            f"{self.pairs:,} pairs a step = {self.micro_batch} a micro-batch x {self.accumulation} accumulated x "
            f"{self.processes} {'process' if self.processes == 1 else 'processes'}"
        )
        if self.chunk is not None:
            text += f", embedded in chunks of {min(self.chunk, self.micro_batch)}"
        text += f"; each query sees {self.negatives:,} negatives"
        if self.chunk is None and self.accumulation > 1:
            text += ", those of its own micro-batch (with grad_cache_chunk of all)"
        if self.chunk_that_fits is not None and self.chunk_that_fits >= 2 * self.micro_batch:
            text += (
                f" (memory holds chunks of {self.chunk_that_fits} at least, faster on an accelerator: raise "
                "per_device_train_batch_size to use them)"
            )
        return text


def negatives_per_query(num_pairs: int, loss: str, denominator: str = "all", intra_modality: bool = True) -> int:
    """
    Embeddings of other pairs in a query's denominator, for N pairs over all processes.

    CL, and GCL with `denominator="target"`: N−1, those of the target's modality. AlignCLIP: N−1 likewise (its
    separation is another term, against N−1 of the query's own modality). GCL otherwise: 3N−3, or 2N−2 without
    `intra_modality`. Not counted is the pair's own third embedding, which `denominator="all"` holds too; pairs with
    equal ids or captions are masked and make it less.
    """
    modalities = 1 if loss != "gcl" or denominator == "target" else 3 if intra_modality else 2
    return modalities * (num_pairs - 1)


def accumulation_for(effective: int, micro_batch: int, processes: int, num_training_pairs: int) -> int:
    """
    Micro-batches that make `effective` pairs over all processes.

    Raises:
        ValueError: more pairs than there are, or no multiple; the nearest workable values are named.
    """
    at_once = micro_batch * processes
    if effective > num_training_pairs:
        largest = num_training_pairs // at_once * at_once
        raise ValueError(
            f"training.effective_batch_size is {effective}, but the training data has {num_training_pairs} pairs: "
            f"use at most {largest}"
        )
    if effective % at_once:
        below = effective // at_once * at_once
        nearest = [n for n in (below, below + at_once) if 0 < n <= num_training_pairs]
        text = f"use {' or '.join(map(str, nearest))}"
        if effective % processes == 0:
            share = effective // processes
            divisor = next(n for n in range(min(micro_batch, share), 0, -1) if share % n == 0)
            text += f", or per_device_train_batch_size {divisor}" if divisor > 1 else ""
        raise ValueError(
            f"training.effective_batch_size is {effective}, no multiple of per_device_train_batch_size x processes = "
            f"{micro_batch} x {processes}: {text}"
        )
    return effective // at_once
