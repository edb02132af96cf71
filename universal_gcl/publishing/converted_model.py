"""A model that was converted, not trained, as a whole GCL folder with its model card."""

from collections.abc import Sequence
from pathlib import Path

from modeling_gcl import GCLModel, GCLProcessor
from universal_gcl.publishing.hub_folder import write_conversion
from universal_gcl.publishing.model_folder import save_model_folder
from universal_gcl.retrieval.new_folder import new_folder


def save_converted_model(
    out: Path,
    model: GCLModel,
    processor: GCLProcessor,
    *,
    base_model: str,
    conversion: str,
    base_model_ids: Sequence[str] = (),
    licence: str | None = None,
    licence_note: str = "",
) -> Path:
    """Write everything that `AutoModel`, `AutoProcessor` and `SentenceTransformer` load, and the model card.

    The folder appears whole or not at all.

    Args:
        out: folder to write; must be absent or empty.
        model: the converted model; its weights are written in their dtype.
        processor: the model's processor.
        base_model: what was converted: a Hub id or a few words.
        conversion: what was done, in one or two sentences for the card.
        base_model_ids: Hub ids of the models that were converted.
        licence: licence of the weights in the Hub's spelling, if it is known.
        licence_note: a sentence about the licence.

    Returns:
        `out`.
    """
    with new_folder(out) as folder:
        save_model_folder(folder, model, processor)
        write_conversion(
            folder,
            out=out,
            model=model,
            processor=processor,
            base_model=base_model,
            base_model_ids=base_model_ids,
            licence=licence,
            licence_note=licence_note,
            conversion=conversion,
        )
    return out
