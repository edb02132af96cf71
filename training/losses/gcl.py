"""Generalized Contrastive Learning (arXiv 2509.25638)."""

import math
from dataclasses import dataclass
from typing import Any

from modeling_gcl import gcl_loss
from modeling_gcl.loss import DENOMINATORS, LossResult
from modeling_gcl.modalities import CROSS_DIRECTIONS, parse_direction
from universal_gcl.training.arguments import one_of
from universal_gcl.training.losses.loss import Loss


@dataclass(frozen=True)
class GCL(Loss):
    """
    Generalized Contrastive Learning (arXiv 2509.25638): image, text and fused embeddings, in six directions.

    Args:
        > Loss gcl

        denominator (`str`, *optional*, defaults to `"all"`):
            Which embeddings are in GCL's denominator: `"all"` embeddings of the batch (the paper),
            `"without_other_positive"` (all but the pair's own embedding in the third modality) or `"target"` (those of
            the target's modality only).
        intra_modality (`bool`, *optional*, defaults to `True`):
            Whether GCL's denominator includes embeddings of the anchor's own modality.
        direction_weights (`dict[str, float]`, *optional*):
            Weights of GCL's six terms: `i→t`, `t→i`, `i→it`, `it→i`, `t→it`, `it→t` (anchor→target; `i->t` is
            accepted too). A direction that is not named has weight 1, so null means equal weights (the paper).

    Raises:
        ValueError: a value is not allowed. The message names the setting, the value and what is allowed.
    """

    name = "gcl"
    modalities = ("image", "text", "fused")
    description = "Generalized Contrastive Learning (GCL, [arXiv 2509.25638](https://arxiv.org/abs/2509.25638))"
    citation = """\
@inproceedings{lee2025generalized,
  title     = {Generalized Contrastive Learning for Universal Multimodal Retrieval},
  author    = {Lee, Jungsoo and Cho, Janghoon and Park, Hyojin and Hayat, Munawar and Hwang, Kyuwoong and
               Porikli, Fatih and Choi, Sungha},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2025},
  eprint    = {2509.25638},
  archivePrefix = {arXiv}
}"""

    denominator: str = "all"
    intra_modality: bool = True
    direction_weights: dict[str, float] | None = None

    def __post_init__(self) -> None:
        one_of("denominator", self.denominator, DENOMINATORS)
        if self.direction_weights is None:
            return
        weights = {parse_direction(name): weight for name, weight in self.direction_weights.items()}
        object.__setattr__(self, "direction_weights", weights)
        for direction, weight in weights.items():
            one_of("direction_weights", direction, CROSS_DIRECTIONS)
            if not math.isfinite(weight) or weight < 0:
                raise ValueError(f"direction_weights[{direction}] is {weight}: use a number of at least 0")
        if all(weights.get(direction, 1.0) == 0 for direction in CROSS_DIRECTIONS):
            raise ValueError("direction_weights are all 0: there would be nothing to train")

    def __call__(self, **batch: Any) -> LossResult:
        return gcl_loss(
            **batch,
            denominator=self.denominator,
            intra_modality=self.intra_modality,
            direction_weights=self.direction_weights,
            return_terms=True,
        )

    def negatives_per_query(self, num_pairs: int) -> int:
        """3N−3; 2N−2 without `intra_modality`; N−1 with the denominator `"target"`. The pair's own third embedding,
        which the denominator `"all"` also includes, is not counted."""
        modalities = 1 if self.denominator == "target" else 3 if self.intra_modality else 2
        return modalities * (num_pairs - 1)
