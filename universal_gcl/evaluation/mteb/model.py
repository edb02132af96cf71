"""A GCL model as mteb's encoder, for MIEB and whatever else mteb has of texts and images.

mteb hands rows over in batches of columns. They are embedded as `GCLModel.encode` embeds rows everywhere else: what has
both an image and a text is a fused one.
"""

import hashlib
from pathlib import Path
from typing import get_args

import torch
from huggingface_hub import ModelCard
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.types import Licenses, PromptType
from transformers.utils import cached_file, logging

from universal_gcl.evaluation.model_size import model_size
from universal_gcl.retrieval.fingerprint import model_fingerprint

MODALITIES = ["text", "image"]
_TEXTS_AT_ONCE = 10_000  # encode sorts them by length


class GCLEncoder(AbsEncoder):
    """
    Args:
        model: a `GCLModel`, on its device.
        processor: the checkpoint's processor.
        name: folder or Hub id that they were loaded from.
        instructions: put mteb's prompt of a task before its queries, `"{prompt} {text}"`. A query that is an image
            alone becomes a fused one.
        truncate_dim: as for `GCLModel.encode`.
        settings: what else tells this model's embeddings from the checkpoint's own, such as `{"variant": "centring"}`.
            mteb stores the results of other settings elsewhere.

    Attributes:
        mteb_model_meta: what mteb stores about the model. `name` is the Hub id, or `local/FOLDER`; `revision` the
            commit, or a hash of weights, configuration and processor: results in mteb's cache are of that model.
    """

    def __init__(
        self,
        model,
        processor,
        name: str | Path,
        *,
        instructions: bool = False,
        truncate_dim: int | None = None,
        settings: dict[str, str] | None = None,
    ):
        self.model, self.processor = model, processor
        self.instructions, self.truncate_dim = instructions, truncate_dim
        settings = (settings or {}) | {"instructions": instructions or None, "truncate_dim": truncate_dim}
        self.mteb_model_meta = _describe(
            model, processor, str(name), {key: value for key, value in settings.items() if value is not None}
        )

    def encode(
        self,
        inputs,
        *,
        task_metadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        batch_size: int = 64,
        show_progress_bar: bool = False,
    ) -> torch.Tensor:
        """
        Embed what a task's data loader yields.

        Args:
            inputs: yields batches of columns: `text`, a list of `str`, `image`, a list of PIL images (or None), or
                both. Other columns are not looked at; `id` names a row in errors.
            task_metadata, hf_split, hf_subset, prompt_type: mteb's. Of a retrieval task, queries and documents each
                have their modalities; other tasks say no `prompt_type`.
            batch_size: rows per forward pass.

        Returns:
            (N, D) float32 on the CPU, unit norm, in the order of the rows.

        Raises:
            ValueError: `mteb_model_meta` has other modalities than text and image; the rows hold audio or video; a side
                of a retrieval task has no column for one of its modalities; a row with neither text nor image, or with
                an image that can't be read.
            FloatingPointError: an embedding holds NaN or infinite numbers.
        """
        _check_modalities(self.mteb_model_meta)
        side = ", ".join([task_metadata.name, hf_split, *([prompt_type.value] if prompt_type else [])])
        wanted = task_metadata.get_modalities(prompt_type) if prompt_type else []
        prompt = None
        if self.instructions and prompt_type == PromptType.query:
            prompt = self.get_task_instruction(task_metadata, prompt_type)
        parts = []
        with logging.tqdm(total=len(inputs.dataset), disable=not show_progress_bar, unit="row", desc=side) as progress:
            for some in _groups(inputs, batch_size, lambda batch: _rows(batch, wanted, prompt, side)):
                parts.append(self._embed(some, batch_size, side))
                progress.update(len(some))
        return torch.cat(parts)

    def _embed(self, named_rows, batch_size, side):
        names, rows = zip(*named_rows)
        try:
            embeds = self.model.encode(
                rows, self.processor, batch_size=batch_size, truncate_dim=self.truncate_dim
            )  # (n, D)
        except ValueError as error:
            raise ValueError(f"{side}, counted from {names[0]!r}: {error}") from error
        broken = ~torch.isfinite(embeds).all(dim=1)
        if broken.any():
            raise FloatingPointError(f"{side}: the embedding of {names[int(broken.nonzero()[0])]!r} is not finite")
        return embeds


def _check_modalities(meta):
    """mteb's own wrappers embed the columns that the meta names, by default the text alone, and leave out the others
    without a word; so no meta may stand beside the results that does not name both."""
    if sorted(meta.modalities) != sorted(MODALITIES):
        raise ValueError(f"mteb_model_meta has the modalities {meta.modalities}, not {MODALITIES}")


def _groups(inputs, batch_size, rows_of):
    """Rows to embed at once. Images come decoded, perhaps one a batch; no more of them are held than needed."""
    pending = []
    for batch in inputs:
        pending += rows_of(batch)
        if len(pending) >= (batch_size if "image" in batch else _TEXTS_AT_ONCE):
            yield pending
            pending = []
    if pending:
        yield pending


def _rows(batch, wanted, prompt, side):
    """[(id or number, row of GCLModel.encode)] of a batch of columns."""
    foreign = sorted({"audio", "video"} & {*batch, *wanted})
    if foreign:
        raise ValueError(f"{side}: holds {' and '.join(foreign)}; a GCL model embeds texts and images here")
    missing = [modality for modality in wanted if modality not in batch]
    if missing:
        raise ValueError(f"{side}: has no column {missing[0]!r}, though its rows are of {' and '.join(wanted)}")
    columns = {modality: batch[modality] for modality in MODALITIES if modality in batch}
    if not columns:
        raise ValueError(f"{side}: has neither a column 'text' nor 'image', but {', '.join(map(repr, batch))}")
    rows = [dict(zip(columns, values)) for values in zip(*columns.values())]
    if prompt:
        rows = [row | {"instruction": prompt} for row in rows]
    return list(zip(batch.get("id", range(len(rows))), rows))


def _describe(model, processor, name, settings):
    config, fingerprint = model.config, model_fingerprint(model, processor)
    content = hashlib.sha256("".join(fingerprint[part] for part in ("weights", "config", "processor")).encode())
    content = content.hexdigest()[:16]
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
        modalities=list(MODALITIES),
        experiment_kwargs=settings or None,
    )


def _licence(name, commit):
    """The licence in the checkpoint's model card, if there is one that mteb knows."""
    lenient = {
        f"_raise_exceptions_for_{case}": False for case in ("missing_entries", "connection_errors", "gated_repo")
    }
    path = cached_file(name, "README.md", revision=commit, **lenient)
    licence = ModelCard.load(path).data.get("license") if path else None
    return licence if licence in get_args(Licenses) else None
