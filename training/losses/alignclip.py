"""AlignCLIP's loss (arXiv 2406.17639): CL with intra-modality separation."""

import math
from dataclasses import dataclass
from typing import Any

from modeling_gcl import alignclip_loss
from modeling_gcl.loss import LossResult
from universal_gcl.training.losses.loss import Loss


@dataclass(frozen=True)
class AlignCLIP(Loss):
    """
    AlignCLIP (arXiv 2406.17639): CL, and a term that separates the embeddings within each modality.

    Args:
        > Loss alignclip

        separation_weight (`float`, *optional*, defaults to 0.5):
            Weight of AlignCLIP's intra-modality separation.

    Raises:
        ValueError: a value is not allowed. The message names the setting, the value and what is allowed.
    """

    name = "alignclip"
    modalities = ("image", "text")
    description = (
        "intra-modality separation (AlignCLIP, [arXiv 2406.17639](https://arxiv.org/abs/2406.17639), a baseline of GCL)"
    )
    citation = """\
@misc{eslami2024mitigate,
  title     = {Mitigate the Gap: Investigating Approaches for Improving Cross-Modal Alignment in {CLIP}},
  author    = {Eslami, Sedigheh and de Melo, Gerard},
  year      = {2024},
  eprint    = {2406.17639},
  archivePrefix = {arXiv}
}"""

    separation_weight: float = 0.5

    def __post_init__(self) -> None:
        if not (math.isfinite(self.separation_weight) and self.separation_weight >= 0):
            raise ValueError(f"separation_weight is {self.separation_weight}: use a number of at least 0")

    def __call__(self, **batch: Any) -> LossResult:
        return alignclip_loss(**batch, separation_weight=self.separation_weight, return_terms=True)

    def negatives_per_query(self, num_pairs: int) -> int:
        """N−1: the embeddings of the target's modality. The separation is another term, against N−1 embeddings of the
        query's own modality."""
        return num_pairs - 1
