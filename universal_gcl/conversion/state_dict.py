"""Reads the state dict of a checkpoint file without running any code in it, and checks its values."""

import pickle
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

PICKLE_SUFFIXES = (".pt", ".pth", ".bin")


def read_state_dict(path: str | Path) -> dict[str, torch.Tensor]:
    """Read a `.pt`, `.pth`, `.bin` or `.safetensors` file onto the CPU.

    If the file is a training checkpoint with a `state_dict` entry, that entry is returned.

    Returns:
        The tensors by name, in the dtypes of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the suffix is unknown; the file is truncated or a TorchScript archive; the pickle holds objects
            other than tensors and plain values; the file holds no named tensors; a tensor is sparse or quantised.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file: pass the checkpoint file itself, not its folder.")
    if path.suffix == ".safetensors":
        try:
            state: object = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is truncated or not a safetensors file ({error}): download it again.") from error
    elif path.suffix in PICKLE_SUFFIXES:
        state = read_pickle(path)
    else:
        raise ValueError(f"{path} must end in .safetensors, {', '.join(PICKLE_SUFFIXES)}.")
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{path} holds no state dict: it is a {type(state).__name__} without named tensors.")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise ValueError(f"{path} holds no state dict: its entry {name!r} is {type(value).__name__}, not a tensor.")
        if value.layout != torch.strided or value.is_quantized:
            raise ValueError(f"{path}: {name} is a sparse or quantised tensor, which is not supported: save it dense.")
    return state


def read_pickle(path: Path) -> object:
    """Load what `torch.save` wrote, with PyTorch's restricted unpickler. Errors are those of `read_state_dict`."""
    if is_torchscript(path):
        raise ValueError(
            f"{path} is a TorchScript archive, the format in which OpenAI published CLIP. It holds code, which is not "
            "run. OpenAI's weights need no conversion: use openai/clip-vit-base-patch32 or its siblings. If you trust "
            'another such archive, run torch.save(torch.jit.load("FILE").state_dict(), "WEIGHTS.pt") and convert that.'
        )
    with path.open("rb") as file:
        # a pickle starts with \x80, a zip archive with P; a Git LFS pointer is text
        if file.read(1) not in (b"\x80", b"P"):
            raise ValueError(f"{path} is truncated or was not written by torch.save: download it again.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's own message recommends weights_only=False
        raise ValueError(
            f"{path} holds Python objects other than tensors. Loading them could run code, so the file is not read. If "
            "you trust it, save only its state dict (with torch.save or safetensors) and convert that file."
        ) from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, AttributeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{path} is truncated or was not written by torch.save ({reason}): download it again."
        ) from error


def is_torchscript(path: Path) -> bool:
    """Whether the file is an archive that `torch.jit.save` wrote."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def check_finite_floats(state: Mapping[str, torch.Tensor], names: Iterable[str]) -> None:
    """Check that the named tensors of `state` hold finite floating-point numbers.

    Raises:
        ValueError: some don't; the message names them.
    """
    names = list(names)
    if integers := [name for name in names if not state[name].is_floating_point()]:
        raise ValueError(
            f"quantised weights are not supported, but these tensors hold integers: {list_names(integers)}."
        )
    if damaged := [name for name in names if not torch.isfinite(state[name]).all()]:
        raise ValueError(f"the file is damaged: these tensors hold NaN or infinite values: {list_names(damaged)}.")


def list_names(names: Iterable[str], limit: int = 12) -> str:
    """The first `limit` names, then how many more there are."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
