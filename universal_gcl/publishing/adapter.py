"""Saves a model trained with LoRA, and merges a saved adapter with its base.

model/               the merged model, which loads without peft
model/adapter/       only the adapter: peft's files, and base.json (see `retrieval.adapters`)
"""

from pathlib import Path
from typing import TYPE_CHECKING, Union

import torch

from modeling_gcl import GCLModel, GCLProcessor
from modeling_gcl.fusion import drawn_pairs
from universal_gcl.publishing.converted_model import save_converted_model
from universal_gcl.publishing.hub_folder import ADAPTER_FOLDER, base_model_ids
from universal_gcl.publishing.model_folder import save_model_folder
from universal_gcl.publishing.shown_paths import shown_name
from universal_gcl.retrieval.adapters import adapter_base, load_adapter, save_adapter
from universal_gcl.retrieval.new_folder import check_is_new

if TYPE_CHECKING:
    from peft import PeftModel

TOLERANCE = 1e-5  # largest difference of a coordinate of a unit vector, in float32


def save_with_adapter(
    folder: str | Path, peft_model: "PeftModel", processor: GCLProcessor, base_checksums: dict[str, str]
) -> GCLModel:
    """Save a trained adapter and the merged model, load both again, and compare their embeddings with the trained
    model's.

    Args:
        folder: folder to write into; it is made if absent, and files with the same names are replaced.
        peft_model: `peft.PeftModel` around a [`GCLModel`]. It is merged in place, unless it was loaded in 4 bits.
        processor: the model's processor.
        base_checksums: checksums of the adapter's base, from `retrieval.adapters.weight_checksums`.

    Returns:
        The merged model.

    Raises:
        ValueError: training changed nothing, or a saved model differs from the trained one.
    """
    folder = Path(folder)
    save_adapter(folder / ADAPTER_FOLDER, peft_model, base_checksums)
    if getattr(peft_model.get_base_model(), "is_quantized", False):  # merge with the base in full precision
        peft_model = load_adapter(folder / ADAPTER_FOLDER).to(peft_model.device)
    peft_model.eval()
    trained = _embed(peft_model, processor)
    with peft_model.disable_adapter():
        change = (_embed(peft_model, processor) - trained).abs().max().item()
    if change == 0:
        raise ValueError("training changed nothing: the embeddings are those of the base. Raise learning_rate")
    merged = peft_model.merge_and_unload()
    save_model_folder(folder, merged, processor)
    reloaded = {
        "the adapter": load_adapter(folder / ADAPTER_FOLDER),
        "the merged model": GCLModel.from_pretrained(folder).eval(),
    }
    for what, model in reloaded.items():
        error = (_embed(model.to(merged.device), processor) - trained).abs().max().item()
        if not error <= TOLERANCE or error >= change:
            raise ValueError(
                f"{what} in {folder} differs from the model that was trained: after loading, its embeddings differ by "
                f"{error:.1e} from the trained model's, which differ by {change:.1e} from the base's"
            )
    return merged


def merge_adapter(adapter: str | Path, out: str | Path, base: str | None = None, revision: str | None = None) -> Path:
    """Merge an adapter with its base and save the model as a GCL folder.

    Args:
        adapter: folder of an adapter that training saved.
        out: folder to write; must be absent or empty.
        base: folder or Hub id of the base; by default the one that the adapter names.
        revision: revision of the base on the Hub.

    Returns:
        `out`.

    Raises:
        ValueError: there is no adapter, it lacks keys, or it was trained on another base.
        FileExistsError: `out` is not empty.
    """
    check_is_new(Path(out))
    merged = load_adapter(adapter, base, revision).merge_and_unload()
    base = base or adapter_base(Path(adapter))
    processor = GCLProcessor.from_encoder(base, revision=revision)
    return save_converted_model(
        Path(out),
        merged,
        processor,
        base_model=shown_name(base),
        base_model_ids=base_model_ids(base),
        conversion=f"The LoRA adapter {shown_name(str(adapter))} is merged into its weights.",
    )


@torch.no_grad()
def _embed(model: Union[GCLModel, "PeftModel"], processor: GCLProcessor) -> torch.Tensor:
    """(3 x 12, D) embeddings of drawn pictures, of their captions, and of both fused."""
    images, texts = zip(*drawn_pairs(), strict=True)
    inputs = processor(images=list(images), text=list(texts), return_tensors="pt").to(model.device)
    output = model(**inputs, return_loss=False, return_dict=True)
    return torch.cat([output.image_embeds, output.text_embeds, output.fused_embeds])
