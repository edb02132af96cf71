"""WebVid-CoVR: the official rules, on videos whose ranks are worked out by hand."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from modeling_gcl import GCLModel, GCLProcessor, VideoError, middle_frame
from tests.evaluation.covr.covr_worker import (
    FIRST,
    LENGTHS,
    MIDDLES,
    ROWS,
    NumberReader,
    evaluate,
    make_data,
    write_csv,
)
from tests.support.videos import numbered_frame
from universal_gcl import cli
from universal_gcl.evaluation.benchmark import DEPTH
from universal_gcl.evaluation.covr import frames as covr_frames
from universal_gcl.evaluation.covr.frames import Frames, Videos, extract_frames
from universal_gcl.evaluation.covr.measure import join_frames, rank_targets
from universal_gcl.evaluation.covr.triplets import Triplet, clean_edit, read_triplets
from universal_gcl.retrieval.run import Run

ROOT = Path(__file__).parents[3]

# A and C are the same to the model: A comes first. B's mean has its query's axis only with 1/√197 (× .8), behind E's
# (1/√5 × .6); by the scores it has nearly all of it. D's own video is A, so that only C stands before it.
RANKS = {"mean": [1, 2, 2, 2, 1], "weighted": [1, 1, 2, 2, 1]}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("covr"))


@pytest.fixture(scope="module")
def evaluated(data, tmp_path_factory):
    out, model = tmp_path_factory.mktemp("out"), NumberReader()
    return evaluate(data, out, model=model), out, model


def ranks_of(out, name):
    records = [json.loads(line) for line in (out / "records" / f"{name}.jsonl").read_text().splitlines()]
    return [record["ranks"][0] for record in records]


def test_metrics_are_those_worked_out_by_hand(evaluated):
    result, out, model = evaluated
    assert {name: ranks_of(out, name) for name in RANKS} == RANKS
    for name, r1 in (("mean", 2 / 5), ("weighted", 3 / 5)):
        metrics = result[name]
        assert [metrics[f"hit@{k}"] for k in (1, 5, 10, 50)] == [r1, 1, 1, 1]
        assert metrics["meanR3"] == pytest.approx((r1 + 2) / 3) and metrics["meanR4"] == pytest.approx((r1 + 3) / 4)
    assert model.middles == MIDDLES
    assert result["rows"] == result["gallery"] == 5 and result["own_video_in_gallery"] == 1
    assert result["equal_weights"] == 1 and result["frames"] == {"3": 1, "15": 4}
    assert result["coverage"] == {"rows": [5, 5], "queries": [3, 3], "targets": [5, 5]} and result["left_out"] == []
    assert result["sorted_by_target"] and result["source"]["squash"] is None


def test_similarities_are_those_worked_out_by_hand(evaluated):
    _, out, _ = evaluated
    mean, weighted = (Run.load(out / "runs" / f"{name}.safetensors") for name in ("mean", "weighted"))
    scores = [dict(zip(run.ranking(1), run.scores[1])) for run in (mean, weighted)]
    assert scores[0]["1_a/2"] == pytest.approx(0.8 / 197**0.5, abs=1e-3)
    share = np.exp(10) / (np.exp(10) + 14)
    assert scores[1]["1_a/2"] == pytest.approx(0.8 * share / np.hypot(share, 1 - share), abs=1e-3)
    assert scores[0]["2_b/5"] == scores[1]["2_b/5"] == pytest.approx(0.6 / 5**0.5, abs=1e-3)
    assert mean.ranking(3)[-1] == "1_a/1" and mean.scores[3, -1] == -10
    assert mean.query_ids[0] == "line 2" and mean.query_ids[1] == "line 4"  # each caption spans two lines


def test_frames_cut_out_once_serve_the_next_model(evaluated, data, tmp_path):
    result, out, _ = evaluated
    again = evaluate(data, tmp_path, source=Frames(out / "frames"))
    assert again == result
    assert not (tmp_path / "frames").exists()


def test_a_folder_of_all_frames_gives_the_same(evaluated, data, tmp_path):
    for video, length in LENGTHS.items():
        folder = tmp_path / "frames" / video
        folder.mkdir(parents=True)
        (folder / "._0.jpg").write_bytes(b"left by a file manager")
        for n in range(length):
            Image.fromarray(numbered_frame(FIRST[video] + n)).save(folder / f"frame{n}.jpg")
    model = NumberReader()
    result = evaluate(data, tmp_path / "out", model=model, source=Frames(tmp_path / "frames"))
    source = {"frames": str(tmp_path / "frames"), "squash": None}
    assert result == evaluated[0] | {"source": source} and model.middles == MIDDLES


def test_squashed_frames_are_squares(evaluated, data, tmp_path):
    model = NumberReader()
    result = evaluate(data, tmp_path, model=model, squash=64)
    assert model.sizes == {(64, 64)} and ranks_of(tmp_path, "mean") == RANKS["mean"]
    assert result["source"] == {"videos": str(data / "videos"), "squash": 64}
    model = NumberReader()
    source = Frames(evaluated[1] / "frames")
    assert evaluate(data, tmp_path / "again", model=model, source=source, squash=64)["mean"] == result["mean"]
    assert model.sizes == {(64, 64)}
    with pytest.raises(ValueError, match="holds frames of .*'squash': 64.*, not of .*'squash': None"):
        evaluate(data, tmp_path)
    with pytest.raises(ValueError, match="squash must be at least 1 pixel, got 0"):
        evaluate(data, tmp_path, squash=0)


def test_limit_shrinks_the_gallery(data, tmp_path):
    result = evaluate(data, tmp_path, limit=2)
    assert result["rows"] == result["gallery"] == 2 and ranks_of(tmp_path, "mean") == [1, 1]


@pytest.fixture
def damaged(data, tmp_path):
    """The video of row B is an error page, saved as the authors' script does; that of E is not there."""
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / "videos" / "1_a" / "2.mp4").write_text("<Error>AccessDenied</Error>")
    (tmp_path / "data" / "videos" / "2_b" / "5.mp4").unlink()
    return tmp_path / "data"


def test_videos_that_are_not_there_are_an_error(damaged, tmp_path):
    with pytest.raises(ValueError, match=r"1 of 5 rows lack a video; .*2_b/5.mp4: no such file.*--skip-unreadable"):
        evaluate(damaged, tmp_path / "out")
    with pytest.raises(VideoError, match=r"1_a/2.mp4: not a readable video"):
        evaluate(damaged, tmp_path / "out", limit=2)
    assert not list((tmp_path / "out").rglob("*.partial")) and not (tmp_path / "out" / "embeddings").exists()
    shutil.rmtree(damaged / "videos" / "2_b")
    with pytest.raises(ValueError, match="5 of 5 rows lack a video"):
        evaluate(damaged, tmp_path / "out", skip_unreadable=True)
    with pytest.raises(FileNotFoundError, match="2_b: no such folder"):
        Videos(damaged / "videos" / "2_b")


def test_rows_without_their_videos_are_left_out_by_request(damaged, tmp_path):
    result = evaluate(damaged, tmp_path / "out", skip_unreadable=True)
    assert ranks_of(tmp_path / "out", "mean") == [1, 2, 2] and result["gallery"] == 3
    assert result["coverage"] == {"rows": [3, 5], "queries": [3, 3], "targets": [3, 5]}
    first, last = result["left_out"]
    assert first["line"] == 4 and "2.mp4: not a readable video" in first["why"]
    assert last["line"] == 10 and "5.mp4: no such file" in last["why"]


def test_frames_that_can_not_be_read_are_met_when_embedded(evaluated, data, tmp_path):
    shutil.copytree(evaluated[1] / "frames", tmp_path / "frames")
    (tmp_path / "frames" / "targets" / "1_a" / "2" / "07.png").write_bytes(b"no image")
    (tmp_path / "frames" / "queries" / "2_b" / "7" / "00.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="row '1_a/2, frame 7': .*07.png: not a readable image"):
        evaluate(data, tmp_path / "out", source=Frames(tmp_path / "frames"))
    result = evaluate(data, tmp_path / "skip", source=Frames(tmp_path / "frames"), skip_unreadable=True)
    assert ranks_of(tmp_path / "skip", "mean") == [1, 2, 2]
    assert result["coverage"] == {"rows": [3, 5], "queries": [2, 3], "targets": [4, 5]}
    assert [row["line"] for row in result["left_out"]] == [4, 10]


def test_extraction_goes_on_where_it_was_ended(data, tmp_path, monkeypatch):
    decoded = []
    monkeypatch.setattr(covr_frames, "load_video_frames", lambda path, n: decoded.append(path.stem) or LOAD(path, n))
    wanted = [("targets", "2_b/4"), ("targets", "2_b/5")]
    extract_frames(Videos(data / "videos"), wanted[:1], tmp_path / "frames")
    partial = tmp_path / "frames" / "targets" / "2_b" / "5.partial"
    partial.mkdir()
    (partial / "00.png").touch()
    extract_frames(Videos(data / "videos"), wanted, tmp_path / "frames")
    assert decoded == ["4", "5"] and not partial.exists()
    assert len(Frames(tmp_path / "frames").files("targets", "2_b/5")) == 3
    (tmp_path / "frames" / "frames.json").write_text('{"vid')
    with pytest.raises(ValueError, match="frames.json is damaged .*delete .*frames, and extract"):
        Frames(tmp_path / "frames")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").touch()
    with pytest.raises(ValueError, match="holds files that are not frames"):
        extract_frames(Videos(data / "videos"), wanted, tmp_path / "other")


LOAD = covr_frames.load_video_frames


def test_two_processes_write_what_one_writes(evaluated, data, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    command = [sys.executable, Path(__file__).with_name("covr_worker.py"), data, tmp_path]
    processes = [subprocess.Popen(command, env=environment | {"RANK": rank}) for rank in "01"]
    assert [process.wait() for process in processes] == [0, 0]
    assert json.loads((tmp_path / "result.json").read_text()) == evaluated[0]
    for name in ("frames", "records"):
        files = [path.relative_to(tmp_path) for path in sorted((tmp_path / name).rglob("*")) if path.is_file()]
        assert len(files) > 1
        assert all((tmp_path / path).read_bytes() == (evaluated[1] / path).read_bytes() for path in files)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Make it Night.", "make it night"),
        ('(a) "b"*#:;~! c', "a b c"),
        ("  two   spaces\n", "two spaces"),
        ("keep, these's - and/or?", "keep, these's - and/or?"),
        ("a\tb\nc", "a\tb\nc"),  # on their own they stay
        ("a\t\nb", "a b"),
        ("\ta\n", "\ta"),
        ("ÉTÉ", "été"),
        (" ".join(map(str, range(40))), " ".join(map(str, range(30)))),
    ],
)
def test_cleaning(text, expected):
    assert clean_edit(text) == expected


vectors = st.lists(st.integers(-3, 3), min_size=3, max_size=3)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(vectors, vectors, st.integers(0, 30)), min_size=1, max_size=15))
def test_ranks_are_those_of_a_slow_loop(rows):
    """Small whole numbers: their products are exact, and often equal. A query's video is the target of another row, or
    of none."""
    triplets = [Triplet(n, f"v/{own if own != n else -1}", f"v/{n}", "x", ()) for n, (_, _, own) in enumerate(rows)]
    queries, gallery = (np.array([row[part] for row in rows], dtype=float) for part in (0, 1))
    run = rank_targets(triplets, queries, gallery)
    for n, triplet in enumerate(triplets):
        similarities = [int(queries[n] @ gallery[m]) for m in range(len(rows))]
        if triplet.query in (videos := [other.target for other in triplets]):
            similarities[videos.index(triplet.query)] = -100
        expected = sorted(range(len(rows)), key=lambda m: (-similarities[m], m))
        assert run.ranking(n) == [f"v/{m}" for m in expected]


def test_a_gallery_larger_than_what_is_kept():
    """The query's own video would be among the best that are kept: the next one takes its place."""
    rng = np.random.default_rng(0)
    gallery = rng.integers(-9, 10, (3 * DEPTH, 4)).astype(float)
    triplets = [Triplet(n, f"v/{(n + 1) % len(gallery)}", f"v/{n}", "x", ()) for n in range(len(gallery))]
    queries = np.roll(gallery, -1, axis=0)  # each query resembles its own video most
    run = rank_targets(triplets, queries, gallery)
    similarities = queries @ gallery.T
    for n in range(len(gallery)):
        similarities[n, (n + 1) % len(gallery)] = -1000
        expected = np.argsort(-similarities[n], kind="stable")[:DEPTH]
        assert run.ranking(n) == [f"v/{m}" for m in expected]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(-1, 1), st.floats(0, 1)), min_size=1, max_size=15), st.booleans())
def test_joint_embedding_is_that_of_a_slow_loop(frames, fits):
    angles, scores = zip(*frames)
    embeds = np.array([[np.cos(angle), np.sin(angle)] for angle in angles])
    weights = [np.exp(score / 0.1) for score in scores] if fits else [1] * len(scores)
    total = np.array([0.0, 0.0])
    for weight, embed in zip(weights, embeds):
        total += weight / sum(weights) * embed
    found = join_frames(embeds, scores if fits else (*scores, 0.5))
    np.testing.assert_allclose(found, total / np.linalg.norm(total), atol=1e-12)


GOOD = "pth1,pth2,edit,scores\na/1,a/2,x,[]\n"


@pytest.mark.parametrize(
    "text, message",
    [
        ("pth1,pth2,scores\n", "line 1: there is no column 'edit', only pth1, pth2, scores"),
        ("", "line 1: there is no column 'pth1', only nothing"),
        ("pth1,pth2,edit,scores\n", "covr.csv: no rows"),
        (GOOD + "a/1,a/3,x\n", "line 3: 3 fields, but the header has 4"),
        (GOOD + 'a/1,a/3,"x,[]\n', "line 3: unexpected end of data"),
        (GOOD + '\na/1,a/3,"x\ny",[]\na/1,a/4,x,nan\n', r"line 6: scores must be a list of numbers.*got 'nan'"),
        (GOOD + 'a/1,a/3,x,"[0.1, NaN]"\n', "line 3: scores must be a list of numbers"),
        (GOOD + 'a/1,a/3,x,"[0.1, true]"\n', "line 3: scores must be a list of numbers"),
        (GOOD + "a/1,../../etc,x,[]\n", "line 3: pth2 must be folder/id.*got '../../etc'"),
        (GOOD + "../a,a/3,x,[]\n", "line 3: pth1 must be folder/id"),
        (GOOD + "/a,a/3,x,[]\n", "line 3: pth1 must be folder/id"),
        (GOOD + "a/..\\..\\b,a/3,x,[]\n", "line 3: pth1 must be folder/id"),
        (GOOD + "a/3,a/3,x,[]\n", "line 3: the target is the query's own video, a/3"),
        (GOOD + "a/1,a/2,y,[]\n", "line 3: line 2 has the same target, a/2; keep one of them"),
        (GOOD + "a/1,a/3, !! ,[]\n", "line 3: the edit ' !! ' has no words after cleaning"),
        ((GOOD + "a/1,a/3,\udce9,[]\n"), "line 3: not UTF-8"),
    ],
)
def test_rows_that_are_refused(tmp_path, text, message):
    path = tmp_path / "covr.csv"
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match=message):
        read_triplets(path)


def test_a_file_without_scores_gives_only_the_mean(data, tmp_path):
    (tmp_path / "videos").symlink_to(data / "videos")
    (tmp_path / "covr.csv").write_text("edit,pth2,pth1\n" + "".join(f"{e},{t},{q}\n" for q, t, e, _ in ROWS[3:]))
    result = evaluate(tmp_path, tmp_path / "out")
    assert result["weighted"] is None and result["mean"]["hit@1"] == 1
    assert not (tmp_path / "out" / "records" / "weighted.jsonl").exists()


def test_the_official_file_is_read(tmp_path):
    path = write_csv(tmp_path / "covr.csv")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    triplets = read_triplets(path)
    assert [(t.query, t.target, t.edit, list(t.scores)) for t in triplets] == [tuple(row) for row in ROWS]
    assert [t.line for t in triplets] == [2, 4, 6, 8, 10]


def invoke(*arguments):
    return CliRunner().invoke(cli.app, ["evaluate", "covr", *map(str, arguments)])


def test_the_command_ranks_as_encode_does(clip_folder, data, tmp_path):
    """`encode` has a way of its own to a video's embedding, the mean of its 15 frames."""
    model, processor = GCLModel.from_encoder(clip_folder).eval(), GCLProcessor.from_encoder(clip_folder)
    rows = [(data / "videos" / f"{q}.mp4", data / "videos" / f"{t}.mp4", clean_edit(e)) for q, t, e, _ in ROWS]
    queries = model.encode([{"image": middle_frame(query), "text": text} for query, _, text in rows], processor)
    similarities = queries @ model.encode([{"video": target} for _, target, _ in rows], processor).T
    similarities[3, 0] = -10

    options = ["--csv", data / "covr.csv", "--videos", data / "videos", "--variant", "plain", "--variant", "sum+native"]
    done = invoke(clip_folder, *options, "--out", tmp_path)
    assert done.exit_code != 0 and "join one fusion rule" in str(done.exception) and not list(tmp_path.iterdir())
    options[-1] = "normalized_sum"
    done = invoke(clip_folder, *options, "--out", tmp_path)
    assert done.exit_code == 0, done.output
    expected = ["compare.md", "directions.png", "frames", "normalized_sum", "plain"]
    assert sorted(path.name for path in tmp_path.iterdir()) == expected
    run = Run.load(tmp_path / "plain" / "runs" / "mean.safetensors")
    for n, scores in enumerate(similarities.numpy()):
        found = dict(zip(run.ranking(n), run.scores[n]))
        np.testing.assert_allclose([found[target] for _, target, _, _ in ROWS], scores, atol=2e-3)
    written = json.loads((tmp_path / "plain" / "results.json").read_text())
    assert written["protocol"] == "covr" and written["variant"] == "plain" and written["limit"] is None
    assert written["csv"] == str(data / "covr.csv") and written["result"]["coverage"]["rows"] == [5, 5]
    r1 = 100 * written["result"]["mean"]["hit@1"]
    shown = f"R@1 +{r1:.2f} .*37.60\n(.*\n)+5 queries, 5 targets"
    assert re.search(shown, done.output) and "smoke run" not in done.output
    assert all(len(line) <= 100 for line in done.output.splitlines() if line.startswith("R@"))


def test_the_command_says_what_is_left_out(clip_folder, damaged, tmp_path):
    options = ["--csv", damaged / "covr.csv", "--out", tmp_path / "out"]
    done = invoke(clip_folder, *options, "--videos", damaged / "videos", "--skip-unreadable", "--limit", 4)
    assert done.exit_code == 0, done.output
    assert "rows: 3 of 4; without the others" in done.output and "smoke run on the first 4 rows" in done.output
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written["limit"] == 4 and written["skip_unreadable"] and written["result"]["left_out"][0]["line"] == 4
    for sources in ([], ["--videos", damaged, "--frames", damaged]):
        assert "give either --videos or --frames" in str(invoke(clip_folder, *options, *sources).exception)
