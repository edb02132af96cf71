"""Saves and loads LoRA adapters of a GCL model, in peft's format, and checks two things that peft does not.

- peft loads an adapter file that lacks keys without an error, and the layers without keys stay as in the base model.
  Here this is an error.
- peft loads an adapter onto any base model with the same shapes. Here an adapter has a `base.json` with the SHA-256
  checksums of the weight files of its base, and another base is an error.
"""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from modeling_gcl import GCLModel

if TYPE_CHECKING:
    from peft import PeftModel

ADAPTER_WEIGHTS, ADAPTER_CONFIG, BASE = "adapter_model.safetensors", "adapter_config.json", "base.json"


def save_adapter(folder: Path, peft_model: "PeftModel", base_checksums: dict[str, str]) -> None:
    """
    Write a trained adapter and its `base.json`, and check the file by reading it again.

    Args:
        peft_model: a [`GCLModel`] with an adapter.
        base_checksums: the checksums of the base model, from `weight_checksums`.

    Raises:
        ValueError: the file differs from the adapter in memory.
    """
    # True would ask the Hub whether the vocabulary of the base has changed. GCL doesn't train token embeddings
    peft_model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's template of a model card; ours describes the adapter
    (folder / BASE).write_text(json.dumps(base_checksums, indent=2) + "\n", encoding="utf-8")
    check_adapter_weights(folder, peft_model)


def load_adapter(folder: str | Path, base: str | None = None, revision: str | None = None) -> "PeftModel":
    """
    Load an adapter onto its base model, in float32.

    Args:
        folder: the folder of the adapter.
        base: folder or Hub id of the base model. Defaults to the one that the adapter names.
        revision: branch, tag or commit of a base model on the Hub.

    Returns:
        The base model with the adapter, in evaluation mode.

    Raises:
        ValueError: the folder has no adapter, the adapter lacks keys, or it was trained on another base model.
        OSError: there is no such base model.
    """
    from peft import PeftModel

    folder = Path(folder)
    base = base or adapter_base(folder)
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise ValueError(
            f"{base}, the base of the adapter in {folder}, does not exist: give its present folder or Hub id"
        )
    expected = read_base_checksums(folder)
    if expected != weight_checksums(base, revision):
        raise ValueError(f"the adapter in {folder} was trained on another base than {base}: the weight files differ")
    model = GCLModel.from_pretrained(base, revision=revision, dtype=torch.float32)
    try:
        peft_model = PeftModel.from_pretrained(model, str(folder))
    except (RuntimeError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(f"the adapter in {folder} does not fit {base}: {error}") from error
    check_adapter_weights(folder, peft_model)
    return peft_model.eval()


def check_adapter_weights(folder: str | Path, peft_model: "PeftModel") -> None:
    """Check that the file of an adapter has the same keys and values as the adapter in memory.

    Raises:
        ValueError: they differ.
    """
    saved, held = check_adapter_keys(folder, peft_model)
    wrong = [name for name, tensor in saved.items() if not torch.equal(tensor, held[name].detach().cpu())]
    if wrong:
        raise ValueError(f"{folder} holds other values than the model for {len(wrong)} keys, such as {min(wrong)}")


def check_adapter_keys(
    folder: str | Path, peft_model: "PeftModel"
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Check that the file of an adapter has the same keys as the adapter in memory.

    Returns:
        The tensors of the file and those in memory, by name.

    Raises:
        ValueError: there is no file, or its keys differ.
    """
    from peft import get_peft_model_state_dict

    path = Path(folder) / ADAPTER_WEIGHTS
    if not path.is_file():
        raise ValueError(f"{folder} holds no adapter: there is no {ADAPTER_WEIGHTS}")
    try:
        saved = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or cut off ({error}): train or download it again") from error
    held = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    for names, fault in ((held.keys() - saved.keys(), "missing"), (saved.keys() - held.keys(), "unknown")):
        if names:
            raise ValueError(f"{path}: {len(names)} {fault} keys, such as {min(names)}: train or download it again")
    return saved, held


def adapter_base(folder: Path) -> str:
    """The folder or Hub id of the base model, as the adapter names it.

    Raises:
        ValueError: the folder has no adapter, or the adapter names no base model.
    """
    try:
        base = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder} holds no adapter: {ADAPTER_CONFIG} is missing or damaged ({error})") from error
    if not isinstance(base, str):
        raise ValueError(f"{folder / ADAPTER_CONFIG} names no base: set its base_model_name_or_path")
    return base


def read_base_checksums(folder: Path) -> dict[str, str]:
    """Read the checksums of the base model from `base.json`.

    Raises:
        ValueError: the file is missing or damaged.
    """
    try:
        return json.loads((folder / BASE).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{folder} does not say which weights its adapter is for: {BASE} is missing or damaged ({error})"
        ) from error


def weight_checksums(model: str | Path, revision: str | None = None) -> dict[str, str]:
    """
    The SHA-256 checksum of each weight file of a model.

    Args:
        model: folder or Hub id. From the Hub, the weight files are downloaded.
        revision: branch, tag or commit of a model on the Hub.

    Returns:
        The name of each file → its checksum.

    Raises:
        OSError: there are no weight files.
    """
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

    optional = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    index = cached_file(str(model), SAFE_WEIGHTS_INDEX_NAME, **optional)
    names = [SAFE_WEIGHTS_NAME]
    if index is not None:
        names = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    checksums = {}
    for name in names:
        path = cached_file(str(model), name, revision=revision)
        assert path is not None  # cached_file raises an OSError if there is no such file
        with Path(path).open("rb") as file:
            checksums[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return checksums
