"""What a loss is: its function, what it needs from a batch, its settings, and what the model card says about it."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from modeling_gcl.loss import LossResult

# what GCLTrainer calls: a Loss, an nn.Module or a plain function, with the keywords of `Loss.__call__`
LossFunction = Callable[..., LossResult]


@dataclass(frozen=True)
class Loss(ABC):
    """
    A loss that recipes can choose by name. The dataclass fields of a subclass are its settings. Each needs a default
    and an entry in the docstring, in the form of `GCL`'s; `__post_init__` checks their values.

    Attributes:
        name: its name in `training.loss`.
        modalities: the embeddings that it compares, any of `"image"`, `"text"` and `"fused"`. Others are not computed.
        description: a phrase in Markdown that the model card puts after "trained with".
        citation: BibTeX.
    """

    name: ClassVar[str]
    modalities: ClassVar[tuple[str, ...]]
    description: ClassVar[str]
    citation: ClassVar[str]

    @abstractmethod
    def __call__(self, **batch: Any) -> LossResult:
        """
        The loss of the pairs that all processes hold together.

        Args:
            image_embeds, text_embeds, fused_embeds (`torch.Tensor` of shape `(n, D)`): unit-norm embeddings of this
                process's pairs, those of `modalities` only.
            logit_scale (`torch.Tensor` scalar): 1/τ.
            ids, caption_ids (`torch.LongTensor` of shape `(n,)`, *optional*): pairs with equal ids, or with equal
                caption ids, are not each other's negatives.
            matryoshka_dims, matryoshka_weights (*optional*): the same as for `gcl_loss`; given if they are set.
            processes ([`BatchProcesses`]): the processes that share the batch.

        Returns:
            The scalar loss, and detached scalars by name, which are logged as `loss_NAME`.
        """

    @abstractmethod
    def negatives_per_query(self, num_pairs: int) -> int:
        """How many embeddings of other pairs a query is compared with in a batch of `num_pairs` pairs. Pairs that are
        masked for equal ids or captions are counted too."""
