"""A model trained with LoRA as a folder: merged, with its adapter beside it, and an adapter merged later.

model/               the merged model: every door takes it, without peft
model/adapter/       the adapter alone: peft's files, and base.json (see `retrieval.adapters`)
"""

from pathlib import Path

import torch

from modeling_gcl import GCLModel, GCLProcessor
from modeling_gcl.fusion import drawn_pairs
from universal_gcl.publishing.hub_folder import ADAPTER_FOLDER, base_model_ids, write_conversion
from universal_gcl.publishing.model_folder import save_model_folder
from universal_gcl.publishing.shown_paths import shown_name
from universal_gcl.retrieval.adapters import adapter_base, load_adapter, save_adapter
from universal_gcl.retrieval.new_folder import check_is_new, new_folder

TOLERANCE = 1e-5  # of coordinates of unit vectors in float32


def save_with_adapter(folder: str | Path, peft_model, processor: GCLProcessor, base_checksums: dict) -> GCLModel:
    """
    Save a trained adapter and the merged model, load both again and compare what they embed.

    Args:
        folder: as for `save_model_folder`.
        peft_model: `peft.PeftModel` over a [`GCLModel`]; merged in place, unless it is held in 4 bits.
        processor: the model's.
        base_checksums: of the adapter's base, from `retrieval.adapters.weight_checksums`.

    Returns:
        The merged model.

    Raises:
        ValueError: training changed nothing, or what was saved is not what was trained.
    """
    folder = Path(folder)
    save_adapter(folder / ADAPTER_FOLDER, peft_model, base_checksums)
    if getattr(peft_model.get_base_model(), "is_quantized", False):  # merged it is with the base in full precision
        peft_model = load_adapter(folder / ADAPTER_FOLDER).to(peft_model.device)
    peft_model.eval()
    trained = _embed(peft_model, processor)
    with peft_model.disable_adapter():
        change = (_embed(peft_model, processor) - trained).abs().max().item()
    if change == 0:
        raise ValueError("training has changed nothing: the adapted model embeds as its base. Raise learning_rate")
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
                f"{what} in {folder} is not what was trained: loaded again, its embeddings differ by {error:.1e} from "
                f"those of training, which differ by {change:.1e} from the base's"
            )
    return merged


def merge_adapter(adapter: str | Path, out: str | Path, base: str | None = None, revision: str | None = None) -> Path:
    """
    The model that an adapter and its base make, as a folder.

    Args:
        adapter: folder of an adapter that training saved.
        out: folder to write; absent or empty.
        base: folder or Hub id of its base, if it is not where the adapter says.
        revision: of a base on the Hub.

    Raises:
        ValueError: no adapter, one that lacks keys, or one for another base.
        FileExistsError: `out` holds something.
    """
    check_is_new(Path(out))
    merged = load_adapter(adapter, base, revision).merge_and_unload()
    base = base or adapter_base(Path(adapter))
    processor = GCLProcessor.from_encoder(base, revision=revision)
    origin = {"base_model": shown_name(base), "base_model_ids": base_model_ids(base)}
    done = f"The LoRA adapter {shown_name(str(adapter))} is merged into its weights."
    with new_folder(Path(out)) as folder:
        save_model_folder(folder, merged, processor)
        write_conversion(folder, out=Path(out), model=merged, processor=processor, conversion=done, **origin)
    return Path(out)


@torch.no_grad()
def _embed(model, processor):
    """(3 x 12, D) embeddings of drawn pictures, their captions, and both."""
    images, texts = zip(*drawn_pairs(), strict=True)
    inputs = processor(images=list(images), text=list(texts), return_tensors="pt").to(model.device)
    output = model(**inputs, return_loss=False, return_dict=True)
    return torch.cat([output.image_embeds, output.text_embeds, output.fused_embeds])
