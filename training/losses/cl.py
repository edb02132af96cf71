"""CLIP's symmetric image-text loss (Radford et al., 2021), GCL's baseline."""

from dataclasses import dataclass
from typing import Any

from modeling_gcl import contrastive_loss
from modeling_gcl.loss import LossResult
from universal_gcl.training.losses.loss import Loss


@dataclass(frozen=True)
class CL(Loss):
    """CLIP's loss (CL): the mean of the image-to-text and the text-to-image cross-entropy.

    It has no settings.
    """

    name = "cl"
    modalities = ("image", "text")
    description = "the symmetric image-text contrastive loss of CLIP (CL, a baseline of GCL)"
    citation = """\
@inproceedings{radford2021learning,
  title     = {Learning Transferable Visual Models From Natural Language Supervision},
  author    = {Radford, Alec and Kim, Jong Wook and Hallacy, Chris and Ramesh, Aditya and Goh, Gabriel and
               Agarwal, Sandhini and Sastry, Girish and Askell, Amanda and Mishkin, Pamela and Clark, Jack and
               Krueger, Gretchen and Sutskever, Ilya},
  booktitle = {International Conference on Machine Learning},
  year      = {2021},
  eprint    = {2103.00020},
  archivePrefix = {arXiv}
}"""

    def __call__(self, **batch: Any) -> LossResult:
        return contrastive_loss(**batch, return_terms=True)

    def negatives_per_query(self, num_pairs: int) -> int:
        """N−1: the embeddings of the target's modality."""
        return num_pairs - 1
