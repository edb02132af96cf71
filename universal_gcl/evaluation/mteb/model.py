"""A GCL model as mteb's encoder, for MIEB and mteb's other tasks with texts and images.

mteb passes rows in batches of columns. They are embedded by `GCLModel.encode`, as everywhere: a row with an image and a
text gets a fused embedding.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from pathlib import Path
from typing import cast, get_args

import torch
from huggingface_hub import ModelCard
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.types import Licenses, Modalities, PromptType
from torch.utils.data import DataLoader
from transformers.utils import cached_file, logging

from modeling_gcl import GCLModel, GCLProcessor
from modeling_gcl.modalities import IN_DATA
from universal_gcl.evaluation.model_size import model_size
from universal_gcl.retrieval.fingerprint import model_fingerprint

MTEB_MODALITIES = [IN_DATA["t"], IN_DATA["i"]]  # the names of columns and modalities in mteb
_TEXTS_AT_ONCE = 10_000  # many, since encode sorts them by length

NamedRow = tuple[object, dict]  # id or number, row of `GCLModel.encode`


class GCLEncoder(AbsEncoder):
    """
    Args:
        model: a `GCLModel`, on its device.
        processor: the checkpoint's processor.
        name: folder or Hub id from which they were loaded.
        instructions: put mteb's prompt of a task before its queries, `"{prompt} {text}"`. A query with only an image
            then becomes a fused one.
        truncate_dim: as for `GCLModel.encode`.
        settings: further settings by which these embeddings differ from the checkpoint's own, such as
            `{"variant": "centring"}`. mteb stores results of different settings separately.

    Attributes:
        mteb_model_meta: what mteb stores about the model. `name` is the Hub id or `local/FOLDER`. `revision` is the
            commit, or a hash of weights, configuration and processor, so that results in mteb's cache belong to
            exactly this model.
    """

    mteb_model_meta: ModelMeta

    def __init__(
        self,
        model: GCLModel,
        processor: GCLProcessor,
        name: str | Path,
        *,
        instructions: bool = False,
        truncate_dim: int | None = None,
        settings: dict[str, str] | None = None,
    ):
        self.model, self.processor = model, processor
        self.instructions, self.truncate_dim = instructions, truncate_dim
        own = {"instructions": instructions or None, "truncate_dim": truncate_dim}
        known = {key: value for key, value in ((settings or {}) | own).items() if value is not None}
        self.mteb_model_meta = _describe(model, processor, str(name), known)

    def encode(  # type: ignore[override]  # mteb's precision is refused, not ignored
        self,
        inputs: DataLoader,
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        batch_size: int = 64,
        show_progress_bar: bool = False,
    ) -> torch.Tensor:
        """
        Embed the rows that a task's data loader yields.

        Args:
            inputs: yields batches of columns: `text` (a list of `str`), `image` (a list of PIL images or None), or
                both. Other columns are ignored, except that `id` names a row in error messages.
            task_metadata, hf_split, hf_subset, prompt_type: as mteb passes them. Queries and documents of a retrieval
                task each have their modalities; other tasks have no `prompt_type`.
            batch_size: rows per forward pass.

        Returns:
            (N, D) float32 on the CPU, unit norm, in the order of the rows.

        Raises:
            ValueError: `mteb_model_meta` has other modalities than text and image; the rows hold audio or video; a side
                of a retrieval task lacks the column of one of its modalities; a row has neither text nor image, or an
                image that can't be read.
            FloatingPointError: an embedding holds NaN or infinite numbers.
        """
        _check_modalities(self.mteb_model_meta)
        side = ", ".join([task_metadata.name, hf_split, *([prompt_type.value] if prompt_type else [])])
        wanted = task_metadata.get_modalities(prompt_type) if prompt_type else []
        prompt = None
        if self.instructions and prompt_type == PromptType.query:
            prompt = self.get_task_instruction(task_metadata, prompt_type)
        parts = []
        total = len(cast(Sized, inputs.dataset))
        with logging.tqdm(total=total, disable=not show_progress_bar, unit="row", desc=side) as progress:
            for some in _groups(inputs, batch_size, lambda batch: _rows(batch, wanted, prompt, side)):
                parts.append(self._embed(some, batch_size, side))
                progress.update(len(some))
        return torch.cat(parts)

    def _embed(self, named_rows: list[NamedRow], batch_size: int, side: str) -> torch.Tensor:
        names, rows = zip(*named_rows)
        try:
            embeds = self.model.encode(
                rows, self.processor, batch_size=batch_size, truncate_dim=self.truncate_dim
            )  # (n, D)
        except ValueError as error:
            raise ValueError(f"{side}, rows numbered from {names[0]!r} on: {error}") from error
        broken = ~torch.isfinite(embeds).all(dim=1)
        if broken.any():
            raise FloatingPointError(f"{side}: the embedding of {names[int(broken.nonzero()[0])]!r} is not finite")
        return embeds


def _check_modalities(meta: ModelMeta) -> None:
    """Refuse a meta that doesn't name both modalities. mteb's own wrappers embed the columns that the meta names, by
    default only the text, and drop the others silently; results with such a meta would be misleading."""
    if sorted(meta.modalities) != sorted(MTEB_MODALITIES):
        raise ValueError(f"mteb_model_meta must have the modalities {MTEB_MODALITIES}, but has {meta.modalities}")


def _groups(
    inputs: Iterable[dict], batch_size: int, rows_of: Callable[[dict], list[NamedRow]]
) -> Iterator[list[NamedRow]]:
    """Rows to embed at once. Images come decoded, and a batch may have only one; no more are held than needed."""
    pending: list[NamedRow] = []
    for batch in inputs:
        pending += rows_of(batch)
        if len(pending) >= (batch_size if "image" in batch else _TEXTS_AT_ONCE):
            yield pending
            pending = []
    if pending:
        yield pending


def _rows(batch: dict, wanted: Sequence[str], prompt: str | None, side: str) -> list[NamedRow]:
    """The rows of a batch of columns. `wanted`: the modalities that the side of a retrieval task must have."""
    foreign = sorted({"audio", "video"} & {*batch, *wanted})
    if foreign:
        raise ValueError(f"{side}: holds {' and '.join(foreign)}, but a GCL model embeds only texts and images here")
    missing = [modality for modality in wanted if modality not in batch]
    if missing:
        raise ValueError(f"{side}: has no column {missing[0]!r}, though its rows have {' and '.join(wanted)}")
    columns = {modality: batch[modality] for modality in MTEB_MODALITIES if modality in batch}
    if not columns:
        raise ValueError(f"{side}: has neither a column 'text' nor a column 'image', but {', '.join(map(repr, batch))}")
    rows = [dict(zip(columns, values)) for values in zip(*columns.values())]
    if prompt:
        rows = [row | {"instruction": prompt} for row in rows]
    return list(zip(batch.get("id", range(len(rows))), rows))


def _describe(model: GCLModel, processor: GCLProcessor, name: str, settings: dict) -> ModelMeta:
    config, fingerprint = model.config, model_fingerprint(model, processor)
    hashes = "".join(fingerprint[part] for part in ("weights", "config", "processor"))
    content = hashlib.sha256(hashes.encode()).hexdigest()[:16]
    is_folder = Path(name).is_dir()
    known = [getattr(part, "_commit_hash", None) for part in (config, config.encoder_config)]
    commit = None if is_folder else next(filter(None, known), None)
    size = model_size(model, processor)
    size["embed_dim"] = settings.get("truncate_dim", size["embed_dim"])
    return ModelMeta(
        loader=None,
        name=name if "/" in name and not is_folder else f"local/{Path(name).resolve().name}",
        revision=commit or content,
        release_date=None,
        languages=None,
        **size,
        license=_licence(name, commit),
        open_weights=None,
        public_training_code=None,
        public_training_data=None,
        framework=["PyTorch", "Transformers", "safetensors"],
        similarity_fn_name=ScoringFunction.DOT_PRODUCT,  # of unit vectors
        use_instructions="instructions" in settings,
        training_datasets=None,
        modalities=cast(list[Modalities], list(MTEB_MODALITIES)),
        experiment_kwargs=settings or None,
    )


def _licence(name: str, commit: str | None) -> str | None:
    """The licence in the checkpoint's model card, if mteb knows it."""
    lenient = {
        f"_raise_exceptions_for_{case}": False for case in ("missing_entries", "connection_errors", "gated_repo")
    }
    path = cached_file(name, "README.md", revision=commit, **lenient)
    licence = ModelCard.load(path).data.get("license") if path else None
    return licence if licence in get_args(Licenses) else None
