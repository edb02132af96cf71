"""WebVid-CoVR: composed video retrieval, by the official test and by the GCL paper's reading of it.

A row of the CSV is a query, the middle frame of one video with a text that changes it, and the one video that answers
it. The gallery is the targets of all rows. A target is embedded by its 15 frames, each a row of its own, and both ways
to join them are scored from these:
- `mean`: their mean, as the GCL paper (arXiv 2509.25638) has it;
- `weighted`: the official default, softmax(scores / 0.1) of the CSV's scores of the frames; equal weights where their
  number is not that of the frames.

Frames are unit vectors, and their joint is normalised again. A target that is the query's own video gets similarity
-10. What is written under the run's folder: `frames/` if they were cut out of videos, `embeddings/`,
`runs/WEIGHTING.safetensors` and `records/WEIGHTING.jsonl` as in `evaluation.benchmark`.

Reference: CoVR (arXiv 2308.14746), https://github.com/lucas-ventura/CoVR at f335ebc: src/test/blip/webvid_covr.py and
src/data/webvid_covr.py. It differs in what it does not mean to do: target frames there are BGR, videos that can't be
read are black, equal similarities come in the order of an unstable sort.
"""

import csv
import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from universal_gcl.evaluation.benchmark import DEPTH
from universal_gcl.evaluation.covr.frames import ROLES, Frames, Videos, extract_frames
from universal_gcl.evaluation.paper import markdown_table, paper_table
from universal_gcl.evaluation.scoring import score_run, write_records
from universal_gcl.retrieval.processes import Processes
from universal_gcl.retrieval.run import Run
from universal_gcl.retrieval.search import exact_top_k
from universal_gcl.retrieval.store import Store

WEIGHTINGS = ("mean", "weighted")
KS = (1, 5, 10, 50)
MAX_WORDS = 30
TEMPERATURE = 0.1
OWN_VIDEO = -10.0  # similarity of a target that is the query's own video


@dataclass(frozen=True)
class Triplet:
    """A row of the CSV.

    Attributes:
        line: where it stands in the file, counted from 1.
        query, target: videos, as `folder/id`.
        edit: the text as written.
        scores: of the target's frames; empty if the file has none.
    """

    line: int
    query: str
    target: str
    edit: str
    scores: tuple[float, ...]


def clean_edit(text: str) -> str:
    """The text as the query has it: lower case, `.!"()*#:;~` and runs of white space as one space, at most 30 words.

    Reference: `pre_caption` in src/data/utils.py of CoVR; like there, a tab or line break on its own stays.
    """
    text = re.sub(r"\s{2,}", " ", re.sub(r'[.!"()*#:;~]', " ", text.lower())).rstrip("\n").strip(" ")
    return " ".join(text.split(" ")[:MAX_WORDS])


def read_triplets(path: str | Path, limit: int | None = None) -> list[Triplet]:
    """
    Read `webvid8m-covr_test.csv`, or a file like it: columns `pth1`, `pth2`, `edit`, and `scores` if weights are
    wanted; others are not looked at.

    Args:
        limit: only the first rows.

    Raises:
        FileNotFoundError: no such file.
        ValueError: with file and line, for a row that can't be parsed, a path that is not `folder/id`, an edit of which
            nothing is left, scores that are not a list of numbers, a row whose target is its query, or a second row
            with the same target, of which the official test takes one.
    """
    path = Path(path)
    data = path.read_bytes()
    try:
        reader = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 ({error.reason})") from error
    triplets: list[Triplet] = []
    lines: dict[str, int] = {}  # where each target was seen
    line = 1
    try:
        header = next(reader, [])
        absent = [name for name in ("pth1", "pth2", "edit") if name not in header]
        if absent:
            raise ValueError(f"{path}, line 1: there is no column {absent[0]!r}, only {', '.join(header) or 'nothing'}")
        line = reader.line_num + 1
        for values in reader:
            if limit is not None and len(triplets) == limit:
                break
            if values:  # a blank line is none
                place = f"{path}, line {line}"
                if len(values) != len(header):
                    raise ValueError(f"{place}: {len(values)} fields, but the header has {len(header)}")
                triplet = _triplet(place, line, dict(zip(header, values)))
                if triplet.target in lines:
                    other = lines[triplet.target]
                    raise ValueError(f"{place}: line {other} has the same target, {triplet.target}; keep one of them")
                lines[triplet.target] = line
                triplets.append(triplet)
            line = reader.line_num + 1  # a quoted text may span several
    except csv.Error as error:
        raise ValueError(f"{path}, line {line}: {error}") from error
    if not triplets:
        raise ValueError(f"{path}: no rows" if limit is None else f"{path}: no rows among the first {limit}")
    return triplets


def _triplet(place, line, row):
    for name in ("pth1", "pth2"):
        parts = row[name].split("/")
        if len(parts) != 2 or any(part.strip(" .") == "" or "\\" in part or "\0" in part for part in parts):
            raise ValueError(f"{place}: {name} must be folder/id, the place of a video's file, got {row[name]!r}")
    if row["pth1"] == row["pth2"]:
        raise ValueError(f"{place}: the target is the query's own video, {row['pth1']}, which is never found")
    if not clean_edit(row["edit"]).strip():
        raise ValueError(f"{place}: nothing is left of the edit {row['edit']!r}")
    try:
        scores = json.loads(row.get("scores", "[]"))
        is_list = isinstance(scores, list) and all(type(score) in (int, float) for score in scores)
        valid = is_list and all(map(math.isfinite, scores))
    except ValueError:
        valid = False
    if not valid:
        raise ValueError(f"{place}: scores must be a list of numbers, such as [0.31, 0.4], got {row['scores'][:80]!r}")
    return Triplet(line, row["pth1"], row["pth2"], row["edit"], tuple(map(float, scores)))


def evaluate_covr(
    triplets: Sequence[Triplet],
    source: Videos | Frames,
    embed: Callable[[str, Sequence], Store],
    out: str | Path,
    *,
    frames_folder: str | Path | None = None,
    squash: int | None = None,
    skip_unreadable: bool = False,
    show_progress: bool = False,
) -> dict | None:
    """
    Embed and score. Called by all processes of a launch: they share the frames and the embedding.

    Args:
        triplets: as `read_triplets` returns them.
        source: where their videos are.
        embed: `(name, rows)` → the store of the rows; `Session.embed`, with the same `skip_unreadable`.
        out: folder of the run.
        frames_folder: where the frames of `Videos` are written, by default `out/frames`; as `Frames(frames_folder)` it
            serves further models.
        squash: resize frames to a square of that side, bicubic, before the processor sees them, as the official
            transform does; the processor's own resizing then finds nothing to do if that is its size.
        skip_unreadable: leave out rows whose query or target is not there or can't be read. The recall is then that of
            the other rows in the gallery of their targets.

    Returns:
        On process 0, None on the others:
        - `mean`, `weighted`: metrics in 0..1, `hit@k` (the benchmark's R@k) and those of `evaluation.scoring`, for
          k = 1, 5, 10, 50, and `meanR3`, `meanR4`, the official means of the first three and of all four;
          `weighted` is None if no row has scores;
        - `rows`, `gallery`, `own_video_in_gallery`, `equal_weights`: how many were scored; are searched; have their
          query among the targets; have scores that don't fit their frames. `frames`: number of frames → targets;
        - `sorted_by_target`: whether the rows stand in the order of their targets. If not, the official test masks
          wrong pairs instead of a query with its own video, since it looks up the rows after sorting them;
        - `coverage`: `{"rows", "queries", "targets"}`, each [found, in the file], of distinct videos;
        - `left_out`: `{"line", "why"}` of each row that was not scored;
        - `source`: where the frames are from, and the side they were squashed to.

    Raises:
        ValueError: a video that is not there, without `skip_unreadable`; none that is.
        ImageError, VideoError: (ValueErrors) one that can't be read, without `skip_unreadable`.
    """
    out, unusable = Path(out), {}
    frames_folder = out / "frames" if frames_folder is None else frames_folder
    for triplet in triplets:
        for role, video in _videos(triplet):
            if (why := source.missing(role, video)) is not None:
                unusable[role, video] = why
    usable = _usable(triplets, unusable, skip_unreadable)
    frames = source
    if isinstance(source, Videos) or squash is not None:
        wanted = dict.fromkeys(video for triplet in usable for video in _videos(triplet))
        unusable |= extract_frames(
            source, wanted, frames_folder, squash=squash, skip_unreadable=skip_unreadable, show_progress=show_progress
        )
        usable, frames = _usable(triplets, unusable, skip_unreadable), Frames(frames_folder)

    files = {triplet.target: frames.files("targets", triplet.target) for triplet in usable}
    frame_rows = [
        (f"{video}, frame {number}", {"image": str(path)})
        for video, paths in files.items()
        for number, path in enumerate(paths)
    ]
    targets = embed("targets", frame_rows)
    queries = embed("queries", [(f"line {triplet.line}", _query_row(triplet, frames)) for triplet in usable])
    if Processes().rank != 0:
        return None

    ends = np.cumsum([len(paths) for paths in files.values()])
    rows_of = {video: range(end - len(files[video]), end) for video, end in zip(files, ends.tolist())}
    for name, why in targets.skipped.items():
        unusable["targets", name.rsplit(", frame ", 1)[0]] = why
    for triplet in usable:
        if (why := queries.skipped.get(f"line {triplet.line}")) is not None:
            unusable["queries", triplet.query] = why
    usable = _usable(triplets, unusable, skip_unreadable)
    result = _score(usable, queries, targets, rows_of, out)
    found = {role: {video for triplet in triplets for of, video in _videos(triplet) if of == role} for role in ROLES}
    coverage = {
        role: [len(videos) - sum(of == role for of, _ in unusable), len(videos)] for role, videos in found.items()
    }
    left_out = []
    for triplet in triplets:
        if why := [unusable[video] for video in _videos(triplet) if video in unusable]:
            left_out.append({"line": triplet.line, "why": why[0]})
    return result | {
        "coverage": {"rows": [len(usable), len(triplets)]} | coverage,
        "left_out": left_out,
        "source": frames.describe(),
    }


def _videos(triplet):
    return zip(ROLES, (triplet.query, triplet.target))


def _usable(triplets, unusable: Mapping, skip_unreadable) -> list[Triplet]:
    usable = [triplet for triplet in triplets if not any(video in unusable for video in _videos(triplet))]
    if unusable and (not skip_unreadable or not usable):
        lost = len(triplets) - len(usable)
        raise ValueError(
            f"{lost} of {len(triplets)} rows lack a video; the first one: {next(iter(unusable.values()))}. "
            "Get them, or leave out such rows by --skip-unreadable, and their targets from the gallery"
        )
    return usable


def _query_row(triplet, frames):
    [middle] = frames.files("queries", triplet.query)
    return {"image": str(middle), "text": clean_edit(triplet.edit)}


def _score(triplets, queries, targets, rows_of, out):
    """The part of `evaluate_covr`'s result that needs the embeddings; writes runs and records."""
    place = {name: number for number, name in enumerate(queries.ids)}
    query_embeds = queries.embeddings([place[f"line {triplet.line}"] for triplet in triplets])
    frame_embeds = [targets.embeddings(list(rows_of[triplet.target])) for triplet in triplets]
    scores = [triplet.scores for triplet in triplets]
    result: dict = {name: None for name in WEIGHTINGS}
    for name in WEIGHTINGS if any(scores) else ("mean",):
        gallery = np.stack([join_frames(e, s if name == "weighted" else ()) for e, s in zip(frame_embeds, scores)])
        run = rank_targets(triplets, query_embeds, gallery)
        run.manifest |= {"queries": queries.manifest, "weighting": name}
        metrics, records = score_run(run, {f"line {t.line}": [t.target] for t in triplets}, KS)
        hits = [metrics[f"hit@{k}"] for k in KS]
        result[name] = metrics | {"meanR3": sum(hits[:3]) / 3, "meanR4": sum(hits) / 4}
        (out / "runs").mkdir(parents=True, exist_ok=True)
        run.save(out / "runs" / f"{name}.safetensors")
        videos = [{"query_video": t.query, "target": t.target, "text": clean_edit(t.edit)} for t in triplets]
        write_records(out / "records" / f"{name}.jsonl", [a | b for a, b in zip(records, videos, strict=True)])
    gallery_videos = {triplet.target for triplet in triplets}
    return result | {
        "rows": len(triplets),
        "gallery": len(gallery_videos),
        "own_video_in_gallery": sum(triplet.query in gallery_videos for triplet in triplets),
        "sorted_by_target": all(a.target < b.target for a, b in pairwise(triplets)),
        "equal_weights": sum(len(s) != len(e) for s, e in zip(scores, frame_embeds)),
        "frames": {str(number): count for number, count in sorted(Counter(map(len, frame_embeds)).items())},
    }


def join_frames(embeds: np.ndarray, scores: Sequence[float] = ()) -> np.ndarray:
    """
    One embedding of a video.

    Args:
        embeds: (F, D) unit vectors of its frames.
        scores: of the frames; weights are softmax(scores / 0.1). Equal weights if there are not F.

    Returns:
        (D,) float64, unit norm.
    """
    weights = np.ones(len(embeds))
    if len(scores) == len(embeds):
        weights = np.exp((np.asarray(scores) - max(scores)) / TEMPERATURE)
    joint = weights @ np.asarray(embeds, dtype=np.float64)
    return joint / max(np.linalg.norm(joint), 1e-12)


def rank_targets(triplets: Sequence[Triplet], queries: np.ndarray, gallery: np.ndarray) -> Run:
    """
    The best targets for each row; equal similarities come in the order of the rows.

    Args:
        queries, gallery: (N, D) unit vectors of each row's query and target.

    Returns:
        query ids are `"line N"`, candidates the targets.
    """
    videos = [triplet.target for triplet in triplets]
    place = {video: number for number, video in enumerate(videos)}
    scores, order = (found.numpy() for found in exact_top_k(queries, gallery, len(gallery)))
    own = np.array([place.get(triplet.query, -1) for triplet in triplets])[:, None]  # -1 is nowhere in the order
    is_own = order == own
    scores[is_own] = OWN_VIDEO
    last = np.argsort(is_own, axis=1, kind="stable")[:, :DEPTH]
    used, candidates = np.unique(np.take_along_axis(order, last, axis=1), return_inverse=True)
    return Run(
        query_ids=[f"line {triplet.line}" for triplet in triplets],
        candidate_ids=[videos[number] for number in used],
        candidates=candidates.reshape(last.shape),
        scores=np.take_along_axis(scores, last, axis=1),
        manifest={"k": last.shape[1], "pools": [{"rows": len(gallery), "skipped": 0}], "missing_queries": 0},
    )


def covr_table(result: dict, *, markdown: bool = False) -> str:
    """R@k in percent beside the paper's table 4, which is of the mean, and what was not scored; `result` as
    `evaluate_covr` returns it. For a file with `markdown`, else for a terminal."""
    columns, figures = paper_table("covr")
    ours = [name for name in WEIGHTINGS if result[name] is not None]
    lines = [
        (f"R@{k}", [f"{100 * result[name][f'hit@{k}']:.2f}" for name in ours], [f"{x:.2f}" for x in figures[f"R@{k}"]])
        for k in KS
    ]
    notes = []
    for name, (found, total) in result["coverage"].items():
        if found < total:
            notes.append(f"{name}: {found:,} of {total:,}; without the others it is another, easier benchmark")
    counts = f"{result['rows']:,} queries, {result['gallery']:,} targets."
    if markdown:
        table = markdown_table(["", *ours, *columns], [(label, *cells, *paper) for label, cells, paper in lines])
        return "\n\n".join(
            [table, f"{counts} Other columns than {' and '.join(ours)}: the paper, of the mean.", *notes]
        )

    def line(label, cells, paper):
        return f"{label:<6}" + "".join(f"{cell:>9}" for cell in cells) + "  |" + "".join(f"{c:>12}" for c in paper)

    lines = [line("", ours, columns), *(line(*each) for each in lines)]
    return "\n".join([*lines, f"{counts} Right of the bar: the paper, of the mean", *notes])
