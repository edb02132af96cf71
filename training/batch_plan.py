"""What a contrastive batch consists of: micro-batches, processes and chunks, and how many negatives each query gets."""

from dataclasses import dataclass


@dataclass(frozen=True)
class BatchPlan:
    """
    Args:
        micro_batch: pairs that one process loads at a time.
        accumulation: micro-batches of one optimiser step.
        processes: number of processes.
        chunk: pairs embedded at a time; None without GradCache.
        negatives: embeddings of other pairs that each query is compared with; None if the loss doesn't say.
        chunk_that_fits: the largest chunk that fits in memory, if it was measured.
    """

    micro_batch: int
    accumulation: int
    processes: int
    chunk: int | None
    negatives: int | None
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
        if self.negatives is not None:
            text += f"; each query sees {self.negatives:,} negatives"
            if self.chunk is None and self.accumulation > 1:
                text += " from its own micro-batch (with grad_cache_chunk, from all)"
        if self.chunk_that_fits is not None and self.chunk_that_fits >= 2 * self.micro_batch:
            text += (
                f" (chunks of at least {self.chunk_that_fits} fit in memory and are faster on an accelerator: raise "
                "per_device_train_batch_size to use them)"
            )
        return text


def accumulation_for(effective: int, micro_batch: int, processes: int, num_training_pairs: int) -> int:
    """
    How many micro-batches make `effective` pairs over all processes.

    Raises:
        ValueError: there are fewer pairs, or `effective` is not a multiple; the message names the nearest values that
            work.
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
            f"training.effective_batch_size is {effective}, which is not a multiple of per_device_train_batch_size x "
            f"processes = {micro_batch} x {processes}: {text}"
        )
    return effective // at_once
