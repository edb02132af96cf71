"""Embeds rows and writes the embeddings to disk, as a store (`retrieval.store`).

Notable features:
- Rows are read when they are needed. Rows with equal contents are embedded once. The vectors are stored in the order of
  the smallest id that has them, so that the order of the rows does not affect ties in a search.
- Each shard of the result is complete or absent. After a kill, the same call embeds the missing shards and the result
  has the same bytes.
- The manifest names the model, the options and the rows. A folder with embeddings of something else is refused before
  anything is embedded.
- The processes of `accelerate launch` or torchrun share the shards. The result does not depend on the number of
  processes. On a GPU, each process decodes and embeds in several threads.
"""

import copy
import hashlib
import json
import os
import threading
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
from transformers.utils import logging

from modeling_gcl import GCLModel, GCLProcessor, ImageError, VideoError
from universal_gcl.retrieval.contents import Rows, distinct_contents, read_contents, reason_of
from universal_gcl.retrieval.fingerprint import describe_model, model_fingerprint, same_model
from universal_gcl.retrieval.processes import Processes
from universal_gcl.retrieval.progress import Progress, job_name
from universal_gcl.retrieval.quantised import delete_codes
from universal_gcl.retrieval.store import FORMAT, Store, read_array, read_manifest, shard_paths, write_json, write_whole

logger = logging.get_logger(__name__)

_MAX_ENCODERS = 8


def embed_rows(
    model: GCLModel,
    processor: GCLProcessor | None,
    rows: Rows,
    folder: str | Path,
    *,
    batch_size: int = 64,
    on_error: str = "raise",
    truncate_dim: int | None = None,
    num_frames: int = 15,
    shard_rows: int = 4096,
    num_workers: int | None = None,
    show_progress: bool = False,
) -> Store:
    """
    Embed rows into a folder. If an earlier call was interrupted, continue it.

    Before anything is embedded, the contents of all rows are hashed, files by their bytes. So each file is read twice.

    Args:
        model: a `GCLModel`, or another module with the same `encode` and `config`. In each process, it is on the
            device of that process. It is set to evaluation mode.
        processor: the processor of the model.
        rows: a sequence of `(id, row)`. Each id is a `str` and unique; each row is as `GCLModel.encode` takes it. All
            items are read once in their order, to hash them, and then once by id, to embed them. An item is needed for
            a short time only, so the sequence may make it when it is read.
        folder: the folder of the store. It is created if needed. Don't keep anything else in it.
        batch_size, truncate_dim, num_frames: see `GCLModel.encode`.
        on_error: what to do with rows that can't be read: `"raise"` an error, or `"skip"` them. The ids of skipped
            rows and the reasons are in `Store.skipped`.
        shard_rows: number of rows that are embedded by one call of `encode` and written to one file. After a kill, at
            most one shard per thread has to be embedded again.
        num_workers: number of threads. Each decodes and embeds its own shards. Defaults to 1 on a CPU; otherwise to
            the number of cores for each process on this machine, at most 8. It does not affect the result.
        show_progress: show the progress of process 0. Without a terminal, that is a line every half minute.

    Returns:
        The complete store.

    Raises:
        ValueError: there are no rows, an id occurs twice, a row has nothing to embed (the message names its id), or the
            folder has embeddings of another model, of other rows, or with other options.
        ImageError, VideoError: (both ValueErrors) an image or video can't be read. The message names the id of the row.
        FloatingPointError: an embedding has NaN or infinite numbers. The message names the id of the row.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error={on_error!r} is unknown: choose 'raise' or 'skip'")
    for name, number in (("shard_rows", shard_rows), ("num_workers", 1 if num_workers is None else num_workers)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    if not len(rows):
        raise ValueError("there are no rows to embed")
    folder, processes = Path(folder), Processes()
    folder.mkdir(parents=True, exist_ok=True)
    manifest = {
        "format": FORMAT,
        "complete": False,
        "model": model_fingerprint(model, processor),
        "options": {"truncate_dim": truncate_dim, "num_frames": num_frames},
        "shard_rows": shard_rows,
    }
    _check_manifest(folder, manifest)
    shown = show_progress and processes.rank == 0
    contents, unreadable, ids = read_contents(rows, processes, on_error, shown)
    hashes = {"contents": hashlib.sha256(contents.tobytes()).hexdigest()}
    hashes["ids"] = processes.gather(ids and hashlib.sha256(json.dumps(ids).encode()).hexdigest())[0]
    manifest |= {"rows": len(rows), **hashes}
    _check_manifest(folder, manifest)
    first, vector_of = (None, None) if ids is None else distinct_contents(contents, ids)
    first = processes.gather(first)[0]
    paths = shard_paths(folder, -(-len(first) // shard_rows))
    # process 0 starts to write only after all processes have looked at the folder
    state = processes.gather((read_manifest(folder) or {}, [n for n, path in enumerate(paths) if not path.exists()]))
    known, missing = state[0]
    if known.get("complete"):
        return _open(folder, on_error)
    if processes.rank == 0:
        delete_codes(folder)  # they belong to other vectors
        write_json(folder / "manifest.json", manifest)
    encode = _Encoder(model, processor, batch_size, truncate_dim, num_frames)
    job = _Job(rows, encode, paths, first, shard_rows, on_error)
    job.run(missing[processes.rank :: processes.size], len(paths) - len(missing), num_workers, processes, shown)
    processes.gather(None)
    if ids is not None and vector_of is not None:  # on process 0
        _finish(folder, manifest, paths, ids, unreadable, first, vector_of)
    processes.gather(None)
    return _open(folder, on_error)


def _open(folder: Path, on_error: str) -> Store:
    store = Store(folder)
    if on_error == "raise" and store.skipped:  # an earlier call had on_error="skip"
        name, why = next(iter(store.skipped.items()))
        raise ImageError(f"row {name!r}: {why} ({len(store.skipped)} rows of {folder} were skipped)")
    return store


def _check_manifest(folder: Path, manifest: dict) -> None:
    """Raise ValueError if the folder has embeddings whose manifest differs in a key that is known so far."""
    known = read_manifest(folder)
    if known is None:
        if any(folder.glob("vectors-*")):
            raise ValueError(f"{folder} holds embeddings without a manifest.json: choose another folder, or empty it")
        return
    if not known["complete"] and not any(folder.glob("vectors-*.npy")):
        return  # an earlier call failed before anything was embedded
    remedy = "Choose another folder, or delete this one"
    if not same_model(known["model"], manifest["model"]):
        raise ValueError(
            f"{folder} holds embeddings of another model: {describe_model(known['model'])}, not "
            f"{describe_model(manifest['model'])}. {remedy}"
        )
    for name in ("options", "shard_rows"):
        if known[name] != manifest[name]:
            raise ValueError(f"{folder} was embedded with {name} {known[name]}, not {manifest[name]}. {remedy}")
    differences = {"rows": "number of rows differs", "ids": "ids or their order differ", "contents": "contents differ"}
    for name, difference in differences.items():
        if name in manifest and known[name] != manifest[name]:
            raise ValueError(f"{folder} holds embeddings of other rows: the {difference}. {remedy}")


class _Encoder:
    """
    `model.encode` for several threads at once.

    Each thread has its own copy of the processor, because a tokenizer keeps the padding of its last call. The model is
    set to evaluation mode here, because `encode` must not change the mode while another thread runs the model.
    """

    def __init__(
        self,
        model: GCLModel,
        processor: GCLProcessor | None,
        batch_size: int,
        truncate_dim: int | None,
        num_frames: int,
    ) -> None:
        self.model, self.processor = model.eval(), processor
        self.options = {"batch_size": batch_size, "truncate_dim": truncate_dim, "num_frames": num_frames}
        self.copies = threading.local()
        self.lock = threading.Lock()

    @property
    def default_workers(self) -> int:
        if self.model.device.type == "cpu":
            return 1
        return max(1, min(_MAX_ENCODERS, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))

    def __call__(self, rows: list[dict], **kwargs):
        if not hasattr(self.copies, "processor"):
            with self.lock:
                self.copies.processor = copy.deepcopy(self.processor)
        return self.model.encode(rows, processor=self.copies.processor, **self.options, **kwargs)


class _Job:
    """
    Embeds the different contents into shards.

    Args:
        rows: all rows.
        encode: the encoder.
        paths: the files of all shards.
        first: (M,) int64, for each content the row that is embedded.
        shard_rows: number of contents in a shard.
        on_error: as for `embed_rows`.
    """

    def __init__(
        self,
        rows: Rows,
        encode: _Encoder,
        paths: list[Path],
        first: np.ndarray,
        shard_rows: int,
        on_error: str,
    ) -> None:
        self.rows, self.encode, self.paths, self.first = rows, encode, paths, first
        self.shard_rows, self.on_error = shard_rows, on_error

    def run(self, shards: list[int], num_done: int, num_workers: int | None, processes: Processes, shown: bool) -> None:
        """Embed the shards with these numbers. `num_done` shards exist already."""
        workers = num_workers or self.encode.default_workers
        total = sum(len(self._rows_of(shard)) for shard in shards)
        done = min(num_done * self.shard_rows, len(self.first)) if processes.size == 1 else 0
        progress = Progress(job_name("embed", processes), done + total, initial=done, shown=shown)
        with progress, ThreadPoolExecutor(workers) as executor:
            waiting: set[Future[int]] = set()
            try:
                for shard in shards:
                    numbers = self._rows_of(shard).tolist()
                    # read the rows in this thread, because a data set may not be safe to read from several threads
                    waiting.add(executor.submit(self._embed, shard, [self.rows[number] for number in numbers]))
                    while len(waiting) >= workers:
                        waiting = self._wait(waiting, progress)
                while waiting:
                    waiting = self._wait(waiting, progress)
            except BaseException:
                executor.shutdown(wait=False, cancel_futures=True)
                raise

    def _wait(self, waiting: "set[Future[int]]", progress: Progress) -> "set[Future[int]]":
        done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
        for future in done:
            progress.update(future.result())
        return waiting

    def _rows_of(self, shard: int) -> np.ndarray:
        return self.first[shard * self.shard_rows : (shard + 1) * self.shard_rows]

    def _embed(self, shard: int, items: list[tuple[str, dict]]) -> int:
        embeds, kept = self.encode([row for _, row in items], on_error="skip")
        skipped = {place: self._skip_reason(*items[place]) for place in sorted(set(range(len(items))) - set(kept))}
        vectors = np.asarray(embeds.numpy(), dtype=np.float16)
        broken = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if len(broken):
            raise FloatingPointError(
                f"the embedding of row {items[kept[broken[0]]][0]!r} holds NaN or infinite numbers (and so do "
                f"{len(broken)} of the {len(vectors)} in its shard): the model has diverged, or its weights are broken"
            )
        path = self.paths[shard]
        write_json(
            path.with_suffix(".json"), skipped
        )  # the vectors are written last, because they mark the shard as complete
        write_whole(path, lambda file: np.save(file, vectors))
        return len(items)

    def _skip_reason(self, name: str, row: dict) -> str:
        """Why `encode` skipped a row.

        Raises:
            ImageError, VideoError: `on_error` is `"raise"`.
        """
        try:
            self.encode([row], on_error="raise")
        except (ImageError, VideoError) as error:
            why = reason_of(error, 0)
            if self.on_error == "raise":
                raise type(error)(f"row {name!r}: {why}") from error
            return why
        raise RuntimeError(f"row {name!r} could not be read at first, but could at the second attempt: embed again")


def _finish(
    folder: Path,
    manifest: dict,
    paths: list[Path],
    ids: list[str],
    unreadable: dict[int, str],
    first: np.ndarray,
    vector_of: np.ndarray,
) -> None:
    """Write the files that all shards share: ids, the vector of each row, skipped rows, and the complete manifest."""
    shard_rows, number_of, why = manifest["shard_rows"], np.full(len(first) + 1, -1), dict(unreadable)
    by_content = np.argsort(vector_of, kind="stable")
    counts: list[int] = []
    dim = None
    for shard, path in enumerate(paths):
        skipped = json.loads(path.with_suffix(".json").read_text())
        contents = np.arange(shard * shard_rows, min((shard + 1) * shard_rows, len(first)))
        lost = contents[[int(place) for place in skipped]]
        kept = np.setdiff1d(contents, lost)
        number_of[kept] = sum(counts) + np.arange(len(kept))
        vectors = read_array(path, mmap_mode="r")
        if len(vectors) != len(kept):
            raise ValueError(f"{path} has {len(vectors)} vectors for {len(kept)} rows: delete it and embed again")
        counts.append(len(kept))
        dim = vectors.shape[1]
        for content, reason in zip(lost, skipped.values()):
            start, end = (np.searchsorted(vector_of[by_content], content, side) for side in ("left", "right"))
            why |= {int(number): reason for number in by_content[start:end]}
    if not sum(counts):
        number, reason = next(iter(sorted(why.items())))
        raise ValueError(f"none of the {len(ids)} rows can be embedded; the first, {ids[number]!r}: {reason}")
    if why:
        number, reason = next(iter(sorted(why.items())))
        logger.warning(f"{len(why):,} of {len(ids):,} rows were skipped; the first, {ids[number]!r}: {reason}")
    # vector_of is -1 for rows without content, which takes the last entry of number_of, -1
    write_whole(folder / "rows.npy", lambda file: np.save(file, number_of[vector_of]))
    write_json(folder / "ids.json", ids)
    write_json(folder / "skipped.json", {ids[number]: reason for number, reason in sorted(why.items())})
    for partial in folder.glob("*.partial"):  # from processes that were killed
        partial.unlink()
    manifest |= {"dim": dim, "dtype": "float16", "shards": counts, "vectors": sum(counts), "skipped": len(why)}
    write_json(folder / "manifest.json", manifest | {"complete": True})
