"""Stores a model's modality means, for GR-CLIP's centring (arXiv 2507.19054)."""

from pathlib import Path

from modeling_gcl import GCLModel, GCLProcessor
from universal_gcl.evaluation.centring import estimate_modality_means
from universal_gcl.publishing.converted_model import save_converted_model
from universal_gcl.publishing.hub_folder import base_model_ids, read_facts
from universal_gcl.publishing.shown_paths import shown_name
from universal_gcl.retrieval.new_folder import check_is_new
from universal_gcl.retrieval.processes import own_device
from universal_gcl.sources.arguments import SourceArguments
from universal_gcl.sources.pairs import load_pairs


def store_modality_means(
    model: str,
    data: str,
    out_dir: str | Path,
    *,
    split: str = "train",
    limit: int | None = None,
    batch_size: int = 64,
    show_progress: bool = False,
) -> Path:
    """Write the same model with its modality means stored. `AutoModel.from_pretrained(OUT, centring=True)` subtracts
    them; by default centring stays off.

    Args:
        model: folder or Hub id of a GCL checkpoint or any dual encoder.
        data: captioned images for the estimate: a file, a folder or a Hub id. Don't use the images that will be
            searched.
        out_dir: folder to write; must be absent or empty.
        split: split of a Hub data set.
        limit: use only the first pairs.
        batch_size: rows embedded at once.
        show_progress: show a progress bar.

    Returns:
        `out_dir`.

    Raises:
        FileExistsError: `out_dir` is not empty.
        ValueError: there are no pairs, an image can't be read, or the model centres its embeddings already.
        OSError: there is no such model or data.
    """
    out_dir = Path(out_dir)
    check_is_new(out_dir)
    encoder, processor = GCLModel.from_encoder(model).eval(), GCLProcessor.from_encoder(model)
    encoder.to(own_device())
    pairs = load_pairs(SourceArguments(data, split=split, limit=limit))
    estimate_modality_means(encoder, processor, pairs, batch_size=batch_size, show_progress=show_progress)
    licence, licence_note = None, ""
    if (Path(model) / "card.json").is_file():
        facts = read_facts(Path(model))
        licence, licence_note = facts.licence, facts.licence_note
    return save_converted_model(
        out_dir,
        encoder,
        processor,
        base_model=shown_name(model),
        base_model_ids=base_model_ids(model),
        licence=licence,
        licence_note=licence_note,
        conversion=f"The weights are unchanged. The modality means of {len(pairs):,} pairs of {shown_name(data)} are "
        "stored with them; `AutoModel.from_pretrained(..., centring=True)` subtracts the means (GR-CLIP, arXiv "
        "2507.19054).",
    )
