"""Short hashes of everything that embeddings depend on: the weights and configuration of the model, the processor, and
the content of a row."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath
from typing import Any

import torch
from transformers import PreTrainedModel

from modeling_gcl import GCLProcessor, ImageError, VideoError, load_image
from modeling_gcl.rows import Row

_SIZE = 16  # bytes of a hash
# these say where a checkpoint came from and how to load it, not what it computes. The dtype is hashed with the weights
_NOT_CONTENT = {
    "transformers_version", "_name_or_path", "_commit_hash", "_attn_implementation", "architectures", "auto_map",
    "dtype", "processor_class",
}  # fmt: skip


def model_fingerprint(model: PreTrainedModel, processor: GCLProcessor | None) -> dict[str, Any]:
    """
    A fingerprint of a model with its processor. Embeddings may be compared if their fingerprints agree (`same_model`).

    Hashing takes about a second per GB of weights.

    Returns:
        - `weights`: hash (hex) of the weights with their names and dtypes.
        - `config`: hash (hex) of the configuration.
        - `processor`: hash (hex) of the tokenizer, the image processor and the padding.
        - `name`, `revision`: where the weights came from, or None if unknown.
    """
    config = model.config.to_dict()
    return {
        "weights": _hash_weights(model.state_dict()),
        "config": _hash_json(_content(config)),
        "processor": _hash_json(_describe_processor(processor)),
        "name": getattr(model.config, "_name_or_path", None) or None,
        "revision": getattr(model.config, "_commit_hash", None),
    }


def same_model(one: dict, other: dict) -> bool:
    """Whether two fingerprints have the same hashes. Where the models were loaded from does not matter."""
    return all(one[part] == other[part] for part in ("weights", "config", "processor"))


def describe_model(fingerprint: dict) -> str:
    """A fingerprint as text, for error messages: name, revision and hashes."""
    name = fingerprint["name"] or "a model without a name"
    revision = f" at {fingerprint['revision'][:12]}" if fingerprint["revision"] else ""
    hashes = ", ".join(f"{part} {fingerprint[part][:8]}" for part in ("weights", "config", "processor"))
    return f"{name}{revision} ({hashes})"


def content_hash(row: Row) -> bytes:
    """
    A hash of the content of a parsed row. Two rows have the same hash if they have the same text, the same images in
    the same order, and the same video.

    Files and encoded images are hashed by their bytes, and decoded images by their RGB pixels. The name of a file does
    not matter. Each file is read once, at about 1 GB/s per core on a fast disk.

    Returns:
        16 bytes.

    Raises:
        ImageError, VideoError: a file can't be read.
    """
    digest = hashlib.blake2b(digest_size=_SIZE)
    parts = [b"" if row.text is None else b"t" + row.text.encode()]
    parts += [b"i" + _hash_image(image) for image in row.images]
    if isinstance(row.video, list):
        parts += [b"f" + _hash_image(image) for image in row.video]
    elif row.video is not None:
        parts.append(b"v" + _hash_video(row.video))
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()


def _hash_image(value: object) -> bytes:
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, (bytes, bytearray)):
        return b"b" + hashlib.blake2b(value, digest_size=_SIZE).digest()
    if isinstance(value, (str, PurePath)):
        try:
            return b"b" + _hash_file(value)
        except OSError as error:
            load_image(value)  # raises an error with a better message
            raise ImageError(f"{value}: {error}") from error
    image = load_image(value)
    return repr(image.size).encode() + hashlib.blake2b(image.tobytes(), digest_size=_SIZE).digest()


def _hash_video(path: str | PurePath) -> bytes:
    try:
        return _hash_file(path)
    except OSError as error:
        raise VideoError(f"{path}: {error.strerror or error}") from error


def _hash_file(path: str | PurePath) -> bytes:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=_SIZE)).digest()


def _hash_weights(state: dict[str, torch.Tensor]) -> str:
    def hash_one(item):
        name, tensor = item
        data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        digest = hashlib.blake2b(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=_SIZE)
        digest.update(data)
        return digest.digest()

    with ThreadPoolExecutor() as executor:  # hashing releases the GIL
        digests = list(executor.map(hash_one, sorted(state.items())))
    return hashlib.blake2b(b"".join(digests), digest_size=_SIZE).hexdigest()


def _describe_processor(processor: GCLProcessor | None) -> dict:
    if processor is None:
        return {}
    tokenizer = processor.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        described = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    else:
        described = json.loads(backend.to_str())
        for state in ("padding", "truncation"):  # these depend on the last call
            described.pop(state, None)
    return {
        "tokenizer": described,
        "model_max_length": tokenizer.model_max_length,
        "image_processor": _content(processor.image_processor.to_dict()),
        "image_processor_class": type(processor.image_processor).__name__,
        "text_padding": processor.text_padding,
        "max_text_length": processor.max_text_length,
    }


def _content(value: object) -> object:
    """A configuration without the keys in `_NOT_CONTENT`, which don't affect embeddings, at any depth."""
    if isinstance(value, dict):
        return {str(key): _content(item) for key, item in value.items() if key not in _NOT_CONTENT}
    return [_content(item) for item in value] if isinstance(value, (list, tuple)) else value


def _hash_json(value: object) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=_SIZE).hexdigest()
