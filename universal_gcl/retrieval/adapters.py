"""LoRA adapters of a GCL model on disk (peft's format).

peft loads a file that lacks keys without an error, and the result is the base model in part or whole; and an adapter
fits any base of the same shapes. Both are refused here. `base.json` beside an adapter tells its base by the checksums
of its weight files, which the Hub keeps too.
"""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from modeling_gcl import GCLModel

ADAPTER_WEIGHTS, ADAPTER_CONFIG, BASE = "adapter_model.safetensors", "adapter_config.json", "base.json"


def save_adapter(folder: Path, peft_model, base_checksums: dict[str, str]) -> None:
    """
    Write a trained adapter with `base.json`, and read it back.

    Args:
        peft_model: `peft.PeftModel` over a [`GCLModel`].
        base_checksums: what `weight_checksums` says of its base.

    Raises:
        ValueError: the file does not hold what was trained.
    """
    # peft would ask the Hub whether the base's vocabulary has changed: GCL trains no token embeddings
    peft_model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty card; the model's own tells of the adapter
    (folder / BASE).write_text(json.dumps(base_checksums, indent=2) + "\n", encoding="utf-8")
    check_adapter_weights(folder, peft_model)


def load_adapter(folder: str | Path, base: str | None = None, revision: str | None = None):
    """
    An adapter on its base, in float32.

    Args:
        folder: holds the adapter.
        base: folder or Hub id of its base, if it is not where the adapter says.
        revision: of a base on the Hub.

    Returns:
        `peft.PeftModel` in evaluation mode.

    Raises:
        ValueError: no adapter, one that lacks keys, or one for another base.
        OSError: there is no such base.
    """
    from peft import PeftModel

    folder = Path(folder)
    base = base or adapter_base(folder)
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise ValueError(f"{base}, the base of the adapter in {folder}, is not there: say where it is now")
    expected = read_base_checksums(folder)
    if expected != weight_checksums(base, revision):
        raise ValueError(f"the adapter in {folder} is for another base than {base}: their weight files differ")
    model = GCLModel.from_pretrained(base, revision=revision, dtype=torch.float32)
    try:
        peft_model = PeftModel.from_pretrained(model, str(folder))
    except (RuntimeError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(f"the adapter in {folder} does not fit {base}: {error}") from error
    check_adapter_weights(folder, peft_model)
    return peft_model.eval()


def check_adapter_weights(folder: str | Path, peft_model) -> None:
    """
    Raises:
        ValueError: the adapter's file lacks keys of the model's adapter, has others, or other values.
    """
    saved, held = check_adapter_keys(folder, peft_model)
    wrong = [name for name, tensor in saved.items() if not torch.equal(tensor, held[name].detach().cpu())]
    if wrong:
        raise ValueError(f"{folder} holds other values than the model for {len(wrong)} keys, such as {min(wrong)}")


def check_adapter_keys(folder: str | Path, peft_model) -> tuple[dict, dict]:
    """
    The tensors of the adapter's file and those of the model's adapter, by name.

    Raises:
        ValueError: the file is absent, lacks keys, or has others.
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
    for names, what in ((held.keys() - saved.keys(), "lacks"), (saved.keys() - held.keys(), "has the unknown")):
        if names:
            raise ValueError(f"{path} {what} {len(names)} keys, such as {min(names)}: train or download it again")
    return saved, held


def adapter_base(folder: Path) -> str:
    """Folder or Hub id of the base that an adapter names.

    Raises:
        ValueError: no adapter.
    """
    try:
        base = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder} holds no adapter: {ADAPTER_CONFIG} is missing or damaged ({error})") from error
    if not isinstance(base, str):
        raise ValueError(f"{folder / ADAPTER_CONFIG} names no base: set its base_model_name_or_path")
    return base


def read_base_checksums(folder: Path) -> dict[str, str]:
    """What `base.json` says.

    Raises:
        ValueError: it is missing or damaged.
    """
    try:
        return json.loads((folder / BASE).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder} does not say which weights its adapter is for: {BASE} ({error})") from error


def weight_checksums(model: str | Path, revision: str | None = None) -> dict[str, str]:
    """SHA-256 of each weight file of a folder or Hub id (whose files are downloaded), by name.

    Raises:
        OSError: there are none.
    """
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

    optional = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    index = cached_file(str(model), SAFE_WEIGHTS_INDEX_NAME, **optional)
    names = [SAFE_WEIGHTS_NAME]
    if index is not None:
        names = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    checksums = {}
    for name in names:
        with open(cached_file(str(model), name, revision=revision), "rb") as file:
            checksums[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return checksums
