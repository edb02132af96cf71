"""Rows → embeddings on disk (`retrieval.store`), whatever happens on the way.

Notable features:
- rows are read when they are needed; of equal contents, one is embedded; they are stored by their smallest id, so
  that ties of a search don't depend on the order of the rows;
- a shard of the result is written whole or not at all: after a kill, the same call goes on, with the shards that are
  missing, and ends with the same bytes;
- the folder's manifest names model, options and rows: what does not belong together is refused before anything is
  embedded;
- processes of `accelerate launch` or torchrun share the shards; which process, or how many, makes no difference to the
  result. In each, several threads decode and embed at once where the device is a GPU.
"""

import copy
import hashlib
import json
import os
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
from transformers.utils import logging

from modeling_gcl import ImageError, VideoError
from modeling_gcl.rows import parse_row
from universal_gcl.retrieval.fingerprint import content_hash, describe_model, model_fingerprint, same_model
from universal_gcl.retrieval.processes import Processes
from universal_gcl.retrieval.progress import Progress
from universal_gcl.retrieval.quantised import forget
from universal_gcl.retrieval.store import FORMAT, Store, read_array, read_manifest, shard_paths, write_json, write_whole

logger = logging.get_logger(__name__)

_READERS = 8  # threads that hash files
_ROWS_READ_AT_ONCE = 1024
_MAX_ENCODERS = 8
_NO_CONTENT = bytes(16)  # of a row that cannot be read


def embed_rows(
    model,
    processor,
    rows: Sequence,
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
    Embed rows into a folder, or go on where an earlier call was ended.

    Args:
        model: a `GCLModel`, or another module with its `encode` and `config`; in each process on its own device. It is
            left in evaluation mode.
        processor: the checkpoint's processor.
        rows: a sequence of `(id, row)`, the id a `str` of its own, the row as `GCLModel.encode` takes it. Items are
            asked for by their number, in their order to read all contents and then by id to embed, each for a moment,
            so that they may be made on the fly.
        folder: is made; holds nothing else.
        batch_size, truncate_dim, num_frames: as for `encode`.
        on_error: `"raise"`, or `"skip"` to leave out rows that can't be read: they are named with their reason in
            `Store.skipped`.
        shard_rows: rows embedded by one call of `encode` and written as one file; what a kill loses.
        num_workers: threads that decode and embed shards of their own. Default: 1 on CPU, else one for each core that
            the machine has for this process, at most 8. Does not change the result.
        show_progress: on process 0; a line each half minute where there is no terminal.

    Returns:
        the complete `Store`.

    Raises:
        ValueError: no rows, an id twice, a row with nothing to embed (its id is named), a folder that holds embeddings
            of another model, of other rows or made with other options.
        ImageError, VideoError: (ValueErrors) a row's image or video can't be read; its id is named.
        FloatingPointError: an embedding holds NaN or infinite numbers; its id is named.

    Before anything is embedded, all contents are hashed, files by their bytes: each file is read twice in all.
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
    _refuse_others(folder, manifest)
    shown = show_progress and processes.rank == 0
    contents, unreadable, ids = _read_contents(rows, processes, on_error, shown)
    if processes.rank == 0:
        _refuse_repeated(ids)
    hashes = {"contents": hashlib.sha256(contents.tobytes()).hexdigest()}
    hashes["ids"] = processes.gather(ids and hashlib.sha256(json.dumps(ids).encode()).hexdigest())[0]
    manifest |= {"rows": len(rows), **hashes}
    _refuse_others(folder, manifest)
    first, vector_of = _unique(contents, ids) if processes.rank == 0 else (None, None)
    first = processes.gather(first)[0]
    paths = shard_paths(folder, -(-len(first) // shard_rows))
    # process 0 begins to write only when all have looked
    state = processes.gather((read_manifest(folder) or {}, [n for n, path in enumerate(paths) if not path.exists()]))
    known, missing = state[0]
    if known.get("complete"):
        return _opened(folder, on_error)
    if processes.rank == 0:
        forget(folder)  # an int8 form of other vectors
        write_json(folder / "manifest.json", manifest)
    encode = _Encoder(model, processor, batch_size, truncate_dim, num_frames)
    job = _Job(rows, encode, paths, first, shard_rows, on_error)
    job.run(missing[processes.rank :: processes.size], len(paths) - len(missing), num_workers, processes, shown)
    processes.gather(None)
    if processes.rank == 0:
        _finish(folder, manifest, paths, ids, unreadable, first, vector_of)
    processes.gather(None)
    return _opened(folder, on_error)


def _opened(folder, on_error):
    store = Store(folder)
    if on_error == "raise" and store.skipped:  # by an earlier call
        name, why = next(iter(store.skipped.items()))
        raise ImageError(f"row {name!r}: {why} ({len(store.skipped)} rows of {folder} were skipped)")
    return store


def _refuse_others(folder, manifest):
    """Raise ValueError if the folder holds embeddings that differ in what the manifest says so far."""
    known = read_manifest(folder)
    if known is None:
        if any(folder.glob("vectors-*")):
            raise ValueError(f"{folder} holds embeddings without a manifest.json: choose another folder, or empty it")
        return
    if not known["complete"] and not any(folder.glob("vectors-*.npy")):
        return  # an earlier call failed before it had embedded anything
    remedy = "Choose another folder, or delete this one"
    if not same_model(known["model"], manifest["model"]):
        raise ValueError(
            f"{folder} holds embeddings of another model: {describe_model(known['model'])}, not "
            f"{describe_model(manifest['model'])}. {remedy}"
        )
    for name in ("options", "shard_rows"):
        if known[name] != manifest[name]:
            raise ValueError(f"{folder} was embedded with {name} {known[name]}, not {manifest[name]}. {remedy}")
    for name, of in (("rows", "number of rows"), ("ids", "ids or their order"), ("contents", "contents")):
        if name in manifest and known[name] != manifest[name]:
            raise ValueError(f"{folder} holds embeddings of other rows: the {of} differ. {remedy}")


def _read_contents(rows, processes, on_error, shown):
    """(N, 16) uint8 hashes of the rows' contents, zeros for a row that cannot be read; row → why, of those; and on
    process 0 all ids. Each process reads a run of rows."""
    start, end = (len(rows) * rank // processes.size for rank in (processes.rank, processes.rank + 1))
    hashes, unreadable, ids = [], {}, []

    def read(number, item):
        try:
            name, row = item
        except (TypeError, ValueError) as error:
            raise ValueError(f"row {number} must be a pair (id, row), got {type(item).__name__}") from error
        if not isinstance(name, str) or not name:
            raise ValueError(f"row {number}: the id must be a str that is not empty, got {name!r}")
        try:
            return name, content_hash(parse_row(row, number)), None
        except ValueError as error:
            if on_error == "raise":
                raise type(error)(f"row {name!r}: {_reason(error, number)}") from error
            return name, _NO_CONTENT, _reason(error, number)

    with (
        ThreadPoolExecutor(_READERS) as executor,
        Progress(_of_process("read", processes), end - start, shown=shown) as progress,
    ):
        for begin in range(start, end, _ROWS_READ_AT_ONCE):
            numbers = range(begin, min(begin + _ROWS_READ_AT_ONCE, end))
            for number, (name, content, why) in zip(numbers, executor.map(read, numbers, [rows[n] for n in numbers])):
                ids.append(name)
                hashes.append(content)
                if why is not None:
                    unreadable[number] = why
            progress.update(len(numbers))
    ids = processes.collect(ids)
    hashes = b"".join(processes.gather(b"".join(hashes)))
    unreadable = {number: why for part in processes.gather(unreadable) for number, why in part.items()}
    contents = np.frombuffer(hashes, dtype=np.uint8).reshape(-1, 16)
    return contents, unreadable, None if ids is None else [name for part in ids for name in part]


def _reason(error, number):
    """The message without the row's number, which says nothing beside its id."""
    return str(error).removeprefix(f"row {number}").removeprefix(":").strip()


def _refuse_repeated(ids):
    if len(set(ids)) == len(ids):
        return
    seen: set[str] = set()
    twice = sorted({name for name in ids if name in seen or seen.add(name)})
    named = ", ".join(map(repr, twice[:5])) + (", …" if len(twice) > 5 else "")
    raise ValueError(f"{len(twice)} ids occur more than once: {named}; give each row its own id")


def _unique(contents, ids):
    """(U,) for each content the row of smallest id, by that id; and (N,) which of these contents a row has, -1 for
    none."""
    by_id = np.array(sorted(range(len(ids)), key=ids.__getitem__))
    halves = np.ascontiguousarray(contents[by_id]).view(np.uint64)  # (N, 2)
    order = np.lexsort((np.arange(len(halves)), halves[:, 1], halves[:, 0]))
    new = np.ones(len(order), dtype=bool)
    new[1:] = (halves[order[1:]] != halves[order[:-1]]).any(axis=1)
    first_of_row = np.empty(len(order), dtype=np.int64)
    first_of_row[order] = order[new][np.cumsum(new) - 1]
    first_of_row[~halves.any(axis=1)] = -1
    first = np.unique(first_of_row[first_of_row >= 0])
    content_of = np.empty(len(order), dtype=np.int64)
    content_of[by_id] = np.where(first_of_row < 0, -1, np.searchsorted(first, first_of_row))
    return by_id[first], content_of


class _Encoder:
    """`model.encode` for several threads at once: a tokenizer keeps the padding of its last call, so that each thread
    needs its own; and the mode of a module must not change while another thread runs it."""

    def __init__(self, model, processor, batch_size, truncate_dim, num_frames):
        self.model, self.processor = model.eval(), processor
        self.options = {"batch_size": batch_size, "truncate_dim": truncate_dim, "num_frames": num_frames}
        self.copies = threading.local()
        self.lock = threading.Lock()

    @property
    def default_workers(self):
        if self.model.device.type == "cpu":
            return 1
        return max(1, min(_MAX_ENCODERS, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))

    def __call__(self, rows, **kwargs):
        if not hasattr(self.copies, "processor"):
            with self.lock:
                self.copies.processor = copy.deepcopy(self.processor)
        return self.model.encode(rows, processor=self.copies.processor, **self.options, **kwargs)


class _Job:
    """Embeds contents, as the rows `first` have them, into shards."""

    def __init__(self, rows, encode, paths, first, shard_rows, on_error):
        self.rows, self.encode, self.paths, self.first = rows, encode, paths, first
        self.shard_rows, self.on_error = shard_rows, on_error

    def run(self, shards, num_done, num_workers, processes, shown):
        """Embed the shards of these numbers; `num_done` were before."""
        workers = num_workers or self.encode.default_workers
        total = sum(len(self._rows_of(shard)) for shard in shards)
        done = min(num_done * self.shard_rows, len(self.first)) if processes.size == 1 else 0
        progress = Progress(_of_process("embed", processes), done + total, initial=done, shown=shown)
        with progress, ThreadPoolExecutor(workers) as executor:
            waiting = set()
            try:
                for shard in shards:
                    numbers = self._rows_of(shard).tolist()
                    # rows are asked for here, since a data set may not bear several threads
                    waiting.add(executor.submit(self._embed, shard, [self.rows[number] for number in numbers]))
                    while len(waiting) >= workers:
                        waiting = self._wait(waiting, progress)
                while waiting:
                    waiting = self._wait(waiting, progress)
            except BaseException:
                executor.shutdown(wait=False, cancel_futures=True)
                raise

    def _wait(self, waiting, progress):
        done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
        for future in done:
            progress.update(future.result())
        return waiting

    def _rows_of(self, shard):
        return self.first[shard * self.shard_rows : (shard + 1) * self.shard_rows]

    def _embed(self, shard, items):
        embeds, kept = self.encode([row for _, row in items], on_error="skip")
        skipped = {place: self._why(*items[place]) for place in sorted(set(range(len(items))) - set(kept))}
        vectors = np.asarray(embeds.numpy(), dtype=np.float16)
        broken = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if len(broken):
            raise FloatingPointError(
                f"the embedding of row {items[kept[broken[0]]][0]!r} holds NaN or infinite numbers ({len(broken)} of "
                f"{len(vectors)} around it do): the model has diverged or its weights are broken"
            )
        path = self.paths[shard]
        write_json(path.with_suffix(".json"), skipped)  # the vectors come last: they make the shard complete
        write_whole(path, lambda file: np.save(file, vectors))
        return len(items)

    def _why(self, name, row):
        """Of a row that `encode` skipped.

        Raises:
            ImageError, VideoError: with `on_error="raise"`.
        """
        try:
            self.encode([row], on_error="raise")
        except (ImageError, VideoError) as error:
            why = _reason(error, 0)
            if self.on_error == "raise":
                raise type(error)(f"row {name!r}: {why}") from error
            return why
        raise RuntimeError(f"row {name!r} could be read at a second attempt: embed again")


def _finish(folder, manifest, paths, ids, unreadable, first, vector_of):
    """Join the shards: which row has which vector, which were skipped, and the manifest that says all is there."""
    shard_rows, number_of, why = manifest["shard_rows"], np.full(len(first) + 1, -1), dict(unreadable)
    by_content = np.argsort(vector_of, kind="stable")
    counts, dim = [], None
    for shard, path in enumerate(paths):
        skipped = json.loads(path.with_suffix(".json").read_text())
        contents = np.arange(shard * shard_rows, min((shard + 1) * shard_rows, len(first)))
        lost = contents[[int(place) for place in skipped]]
        kept = np.setdiff1d(contents, lost)
        number_of[kept] = sum(counts) + np.arange(len(kept))
        vectors = read_array(path, mmap_mode="r")
        if len(vectors) != len(kept):
            raise ValueError(f"{path} has {len(vectors)} vectors, but {len(kept)} rows: delete it and embed again")
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
        logger.warning(f"{len(why):,} of {len(ids):,} rows skipped; the first, {ids[number]!r}: {reason}")
    # the last entry of number_of is that of rows without content, whose vector_of is -1
    write_whole(folder / "rows.npy", lambda file: np.save(file, number_of[vector_of]))
    write_json(folder / "ids.json", ids)
    write_json(folder / "skipped.json", {ids[number]: reason for number, reason in sorted(why.items())})
    for partial in folder.glob("*.partial"):  # of processes that were killed
        partial.unlink()
    manifest |= {"dim": dim, "dtype": "float16", "shards": counts, "vectors": sum(counts), "skipped": len(why)}
    write_json(folder / "manifest.json", manifest | {"complete": True})


def _of_process(what, processes):
    return what if processes.size == 1 else f"{what} (process {processes.rank} of {processes.size})"
