"""WebVid-CoVR: composed video retrieval, by the official test and by the GCL paper's reading of it.

A row of the CSV is a query (the middle frame of one video, and a text that changes it) and the one video that answers
it. The gallery is the targets of all rows. The 15 frames of a target are embedded as rows of their own, then joined and
scored in two ways:
- `mean`: the mean of the frames, as in the GCL paper (arXiv 2509.25638);
- `weighted`: the official default, weights softmax(scores / 0.1) from the CSV's scores of the frames; equal weights if
  there are not as many scores as frames.

Frames are unit vectors, and the joint vector is normalised again. A target that is the query's own video gets
similarity -10.

Queries and gallery are ranked by `retrieval.search.exact_top_k`, as everywhere. They don't go through
`benchmark.evaluate_tasks`, for two reasons. It searches stored vectors, but a joint vector is made from 15 stored ones
and would lose digits in float16. And the query's own video must be excluded for each query.

The run's folder gets `frames/` if they were extracted from videos, `embeddings/`, and `runs/WEIGHTING.safetensors` and
`records/WEIGHTING.jsonl` as in `evaluation.benchmark`.

Reference: CoVR (arXiv 2308.14746), https://github.com/lucas-ventura/CoVR at f335ebc: src/test/blip/webvid_covr.py and
src/data/webvid_covr.py. Three things in that code are not reproduced, because they are not intended: target frames are
BGR, unreadable videos are black, and equal similarities come in the order of an unstable sort.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from universal_gcl.evaluation.benchmark import DEPTH, KS, Embed, save_and_score
from universal_gcl.evaluation.covr.frames import ROLES, Frames, Videos, extract_frames
from universal_gcl.evaluation.covr.report import WEIGHTINGS
from universal_gcl.evaluation.covr.triplets import Triplet, clean_edit
from universal_gcl.retrieval.processes import Processes
from universal_gcl.retrieval.run import Run
from universal_gcl.retrieval.search import exact_top_k
from universal_gcl.retrieval.store import Store

TEMPERATURE = 0.1
OWN_VIDEO = -10.0  # similarity of a target that is the query's own video


def evaluate_covr(
    triplets: Sequence[Triplet],
    source: Videos | Frames,
    embed: Embed,
    out: str | Path,
    *,
    frames_folder: str | Path | None = None,
    squash: int | None = None,
    skip_unreadable: bool = False,
    show_progress: bool = False,
) -> dict | None:
    """
    Embed and score. All processes of a launch must call this, because they share the frames and the embedding.

    Args:
        triplets: triplets from `read_triplets`.
        source: where their videos are.
        embed: `(name, rows)` → the store of the rows; `Session.embed`, with the same `skip_unreadable`.
        out: folder of the run.
        frames_folder: where the frames of `Videos` are written, by default `out/frames`. `Frames(frames_folder)` gives
            them to further models.
        squash: resize frames to a square of this side, bicubic, before the processor sees them, as the official
            transform does. The processor's own resizing then changes nothing if the side is its size.
        skip_unreadable: leave out rows whose query or target is missing or can't be read. The recall is then that of
            the other rows, in the gallery of their targets.

    Returns:
        On process 0, None on the others:
        - `mean`, `weighted`: metrics in 0..1, `hit@k` (the benchmark's R@k) and those of `evaluation.scoring`, for
          k = 1, 5, 10, 50, and `meanR3`, `meanR4`, the official means of the first three and of all four;
          `weighted` is None if no row has scores;
        - `rows`: how many rows were scored; `gallery`: how many targets were searched; `own_video_in_gallery`: rows
          whose query is also a target; `equal_weights`: rows with another number of scores than frames;
          `frames`: number of frames → number of targets;
        - `sorted_by_target`: whether the rows are sorted by target. If not, the official test masks wrong pairs instead
          of a query with its own video, since it looks up the rows after sorting them;
        - `coverage`: `{"rows", "queries", "targets"}`, each [found, in the file], of distinct videos;
        - `left_out`: `{"line", "why"}` of each row that was not scored;
        - `source`: where the frames are from, and the side to which they were squashed.

    Raises:
        ValueError: a video is missing, and `skip_unreadable` is off; or all videos are missing.
        ImageError, VideoError: (both ValueErrors) a video can't be read, and `skip_unreadable` is off.
    """
    out = Path(out)
    unusable: dict[tuple[str, str], str] = {}  # (role, video) → why
    frames_folder = out / "frames" if frames_folder is None else frames_folder
    for triplet in triplets:
        for role, video in _videos(triplet):
            if (why := source.missing(role, video)) is not None:
                unusable[role, video] = why
    usable = _usable(triplets, unusable, skip_unreadable)
    if isinstance(source, Videos) or squash is not None:
        wanted = dict.fromkeys(video for triplet in usable for video in _videos(triplet))
        unusable |= extract_frames(
            source, wanted, frames_folder, squash=squash, skip_unreadable=skip_unreadable, show_progress=show_progress
        )
        usable, frames = _usable(triplets, unusable, skip_unreadable), Frames(frames_folder)
    else:
        frames = source

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
        if reasons := [unusable[video] for video in _videos(triplet) if video in unusable]:
            left_out.append({"line": triplet.line, "why": reasons[0]})
    return result | {
        "coverage": {"rows": [len(usable), len(triplets)]} | coverage,
        "left_out": left_out,
        "source": frames.describe(),
    }


def _videos(triplet: Triplet) -> Iterator[tuple[str, str]]:
    """Role and video of its query and its target."""
    return zip(ROLES, (triplet.query, triplet.target))


def _usable(triplets: Sequence[Triplet], unusable: Mapping, skip_unreadable: bool) -> list[Triplet]:
    usable = [triplet for triplet in triplets if not any(video in unusable for video in _videos(triplet))]
    if unusable and (not skip_unreadable or not usable):
        lost = len(triplets) - len(usable)
        raise ValueError(
            f"{lost} of {len(triplets)} rows lack a video; the first one: {next(iter(unusable.values()))}. "
            "Get the videos, or leave out such rows, and their targets in the gallery, with --skip-unreadable"
        )
    return usable


def _query_row(triplet: Triplet, frames: Frames) -> dict:
    [middle] = frames.files("queries", triplet.query)
    return {"image": str(middle), "text": clean_edit(triplet.edit)}


def _score(
    triplets: Sequence[Triplet], queries: Store, targets: Store, rows_of: Mapping[str, range], out: Path
) -> dict:
    """The part of `evaluate_covr`'s result that needs the embeddings. Writes runs and records.

    `rows_of`: target → the numbers of its frames' rows.
    """
    place = {name: number for number, name in enumerate(queries.ids)}
    query_embeds = queries.embeddings([place[f"line {triplet.line}"] for triplet in triplets])
    frame_embeds = [targets.embeddings(list(rows_of[triplet.target])) for triplet in triplets]
    scores = [triplet.scores for triplet in triplets]
    result: dict = {name: None for name in WEIGHTINGS}
    for name in WEIGHTINGS if any(scores) else ("mean",):
        gallery = np.stack([join_frames(e, s if name == "weighted" else ()) for e, s in zip(frame_embeds, scores)])
        run = rank_targets(triplets, query_embeds, gallery)
        run.manifest |= {"queries": queries.manifest, "weighting": name}
        positives = {f"line {t.line}": [t.target] for t in triplets}
        about = {
            f"line {t.line}": {"query_video": t.query, "target": t.target, "text": clean_edit(t.edit)} for t in triplets
        }
        metrics = save_and_score(run, positives, out, name, about=about)
        hits = [metrics[f"hit@{k}"] for k in KS]
        result[name] = metrics | {"meanR3": sum(hits[:3]) / 3, "meanR4": sum(hits) / 4}
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
    Join the embeddings of a video's frames into one.

    Args:
        embeds: (F, D) unit vectors of its frames.
        scores: the scores of the frames. The weights are softmax(scores / 0.1), or equal if there are not F scores.

    Returns:
        (D,) float64, unit norm.
    """
    weights = np.ones(len(embeds))
    if len(scores) == len(embeds):
        weights = np.exp((np.asarray(scores) - np.max(scores)) / TEMPERATURE)
    joint = weights @ np.asarray(embeds, dtype=np.float64)
    return joint / np.maximum(np.linalg.norm(joint), 1e-12)


def rank_targets(triplets: Sequence[Triplet], queries: np.ndarray, gallery: np.ndarray) -> Run:
    """
    The best DEPTH targets for each row; equal similarities come in the order of the rows.

    Args:
        queries, gallery: (N, D) unit vectors of each row's query and target.

    Returns:
        a run whose query ids are `"line N"` and whose candidates are the targets.
    """
    videos = [triplet.target for triplet in triplets]
    place = {video: number for number, video in enumerate(videos)}
    k = min(DEPTH + 1, len(gallery))  # one more, as the query's own video may be among them
    scores, order = (found.numpy() for found in exact_top_k(queries, gallery, k))
    own = np.array([place.get(triplet.query, -1) for triplet in triplets])[:, None]  # -1 is not in the order
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
