"""What embeddings depend on, as short hashes: the model's weights and configuration, the processor, a row's content."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath

import torch

from modeling_gcl import ImageError, VideoError, load_image
from modeling_gcl.rows import Row

_SIZE = 16  # bytes of a hash
# where a checkpoint came from and how it is loaded, not what it computes; a weight's dtype is hashed with it
_NOT_CONTENT = {
    "transformers_version", "_name_or_path", "_commit_hash", "_attn_implementation", "architectures", "auto_map",
    "dtype", "processor_class",
}  # fmt: skip


def model_fingerprint(model, processor) -> dict:
    """
    What two sets of embeddings must share to be compared. Takes a second or so for each GB of weights.

    Returns:
        `weights`, `config` and `processor`: hashes (hex), of the weights with their names and dtypes, of the
        configuration, and of tokenizer, image processor and padding; `name` and `revision`: where the weights came
        from, as far as known, None else. Two name the same model if the three hashes are equal: see `same_model`.
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
    """Whether two fingerprints are of the same model, wherever it was loaded from."""
    return all(one[part] == other[part] for part in ("weights", "config", "processor"))


def describe_model(fingerprint: dict) -> str:
    """For messages: the name, as far as known, and the hashes."""
    name = fingerprint["name"] or "a model without a name"
    revision = f" at {fingerprint['revision'][:12]}" if fingerprint["revision"] else ""
    hashes = ", ".join(f"{part} {fingerprint[part][:8]}" for part in ("weights", "config", "processor"))
    return f"{name}{revision} ({hashes})"


def content_hash(row: Row) -> bytes:
    """
    16 bytes that two parsed rows share if and only if they hold the same: equal text, and equal images in equal order.

    Files are hashed by their bytes, whatever their name, as encoded bytes are; decoded images by their RGB pixels. So
    each file is read once, at about a GB/s of a core if the disk can.

    Raises:
        ImageError, VideoError: a file cannot be read.
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


def _hash_image(value) -> bytes:
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, (bytes, bytearray)):
        return b"b" + hashlib.blake2b(value, digest_size=_SIZE).digest()
    if isinstance(value, (str, PurePath)):
        try:
            return b"b" + _hash_file(value)
        except OSError as error:
            load_image(value)  # says better what is wrong
            raise ImageError(f"{value}: {error}") from error
    image = load_image(value)
    return repr(image.size).encode() + hashlib.blake2b(image.tobytes(), digest_size=_SIZE).digest()


def _hash_video(path) -> bytes:
    try:
        return _hash_file(path)
    except OSError as error:
        raise VideoError(f"{path}: {error.strerror or error}") from error


def _hash_file(path) -> bytes:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=_SIZE)).digest()


def _hash_weights(state: dict) -> str:
    def hash_one(item):
        name, tensor = item
        data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        digest = hashlib.blake2b(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=_SIZE)
        digest.update(data)
        return digest.digest()

    with ThreadPoolExecutor() as executor:  # hashing leaves Python's lock
        digests = list(executor.map(hash_one, sorted(state.items())))
    return hashlib.blake2b(b"".join(digests), digest_size=_SIZE).hexdigest()


def _describe_processor(processor) -> dict:
    if processor is None:
        return {}
    tokenizer = processor.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        described = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    else:
        described = json.loads(backend.to_str())
        for state in ("padding", "truncation"):  # of the last call
            described.pop(state, None)
    return {
        "tokenizer": described,
        "model_max_length": tokenizer.model_max_length,
        "image_processor": _content(processor.image_processor.to_dict()),
        "image_processor_class": type(processor.image_processor).__name__,
        "text_padding": processor.text_padding,
        "max_text_length": processor.max_text_length,
    }


def _content(value):
    """A configuration without what says nothing about embeddings, at any depth."""
    if isinstance(value, dict):
        return {str(key): _content(item) for key, item in value.items() if key not in _NOT_CONTENT}
    return [_content(item) for item in value] if isinstance(value, (list, tuple)) else value


def _hash_json(value) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=_SIZE).hexdigest()
