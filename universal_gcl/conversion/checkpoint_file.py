"""Reads the state dict of a checkpoint file without running any code it may hold."""

import pickle
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

PICKLE_SUFFIXES = (".pt", ".pth", ".bin")


def read_state_dict(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a `.pt`, `.pth`, `.bin` or `.safetensors` file by name, on the CPU, dtypes as stored.

    A training checkpoint's `state_dict` entry is taken out of its wrapper.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, a TorchScript archive, a truncated file, a pickle that holds anything but
            tensors and plain values, no named tensors inside, or sparse or quantised ones.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file: give the checkpoint itself, not its folder.")
    if path.suffix == ".safetensors":
        try:
            state = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is truncated or no safetensors file ({error}): download it again.") from error
    elif path.suffix in PICKLE_SUFFIXES:
        state = read_pickle(path)
    else:
        raise ValueError(f"{path} must end in .safetensors, {', '.join(PICKLE_SUFFIXES)}.")
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{path} holds no state dict, but {type(state).__name__} without named tensors.")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise ValueError(f"{path} holds no state dict: its entry {name!r} is {type(value).__name__}, not a tensor.")
        if value.layout != torch.strided or value.is_quantized:
            raise ValueError(f"{path}: {name} is a sparse or quantised tensor, which is not read: save it dense.")
    return state


def read_pickle(path: Path) -> object:
    """What `torch.save` wrote, by PyTorch's restricted unpickler."""
    if is_torchscript(path):
        raise ValueError(
            f"{path} is a TorchScript archive, as OpenAI published CLIP: it holds code, which is not run. The same "
            "weights need no conversion: use openai/clip-vit-base-patch32 or its siblings directly. For another such "
            'archive that you trust: torch.save(torch.jit.load("FILE").state_dict(), "WEIGHTS.pt"), then convert that.'
        )
    with path.open("rb") as file:
        if file.read(1) not in (b"\x80", b"P"):  # a pickle's and an archive's first byte; a Git LFS pointer is text
            raise ValueError(f"{path} is truncated or was not written by torch.save: download it again.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # its own message advises to load with weights_only=False
        raise ValueError(
            f"{path} holds Python objects beside tensors, whose loading could run code: it is not read. Where you "
            "trust it, save its state dict alone (torch.save or safetensors) and convert that file."
        ) from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, AttributeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{path} is truncated or was not written by torch.save ({reason}): download it again."
        ) from error


def is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())
