"""The folder of a Space is complete and valid, and its app shows the page of gcl demo without our package."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests.support.backbones import random_image
from tests.support.doors import run_outside
from tests.support.training_runs import write_parquet

pytest.importorskip("gradio", reason='a Space needs gradio: pip install "universal-gcl[demo]"')

import universal_gcl
from modeling_gcl import GCLModel, GCLProcessor
from universal_gcl import cli
from universal_gcl.application.demo import build_app, encoder_of
from universal_gcl.application.gallery import Gallery
from universal_gcl.application.space import COPIED, write_space
from universal_gcl.publishing.model_folder import save_model_folder

ASK = """
import json, sys
sys.path.insert(0, "space")
import app
import httpx
address = app.launch(app.app, server_name="127.0.0.1")
print("served", "--gcl-image" in httpx.get(address + "config").text)
app.app.close()
(search,) = [fn.fn for fn in app.app.fns.values() if fn.api_name == "search"]
print("pages", json.dumps([search(*query) for query in {queries}]))
"""


def put(hub, repo_id, folder):
    """Make two commits and return the first. The second breaks the model, so main must not be used."""
    hub.repos[repo_id] = {}
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    pinned = hub.commit(repo_id, "main", files, "the model")
    hub.commit(repo_id, "main", {"config.json": b"{}"}, "broken")
    return pinned


@pytest.fixture
def pinned(hub, clip_folder, tmp_path):
    """The commits of org/clip-gcl and of org/clip, a plain CLIP, on a Hub on this machine."""
    torch.manual_seed(3)
    model = GCLModel.from_encoder(str(clip_folder))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    save_model_folder(tmp_path / "model", model, GCLProcessor.from_encoder(str(clip_folder)))
    return put(hub, "org/clip-gcl", tmp_path / "model"), put(hub, "org/clip", clip_folder)


def test_the_app_where_our_package_is_not(hub, pinned, tmp_path, monkeypatch, capsys):
    data = write_parquet(tmp_path / "pairs.parquet", 9)
    command = ["convert", "space", "org/clip-gcl", data, tmp_path / "space", "--limit", 8, "--base", "org/clip"]
    command += ["--revision", pinned[0], "--base-revision", pinned[1]]
    monkeypatch.setattr(sys, "argv", ["gcl", *map(str, command)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    report = capsys.readouterr().out
    assert stop.value.code == 0 and "8 entries, 24 candidates" in report
    assert "hf upload --repo-type space" in report and pinned[0][:12] in report
    space = tmp_path / "space"
    for file in COPIED:
        assert (space / "universal_gcl" / file).read_bytes() == (
            Path(universal_gcl.__file__).parent / file
        ).read_bytes()
    assert not list(space.rglob("*.npy")) and len(list(space.glob("pictures/*.jpg"))) == 8

    card = yaml.safe_load((space / "README.md").read_text().split("---\n")[1])
    assert card["sdk"] == "gradio" and card["app_file"] == "app.py" and card["models"] == ["org/clip-gcl", "org/clip"]
    assert all(re.fullmatch(r"[a-z]+==[\d.]+\n", line) for line in (space / "requirements.txt").open())

    random_image(5).save(tmp_path / "query.png")
    picture = str(tmp_path / "query.png")
    queries = [("a red dog", None), ("", picture), ("a red dog", picture)]
    printed = run_outside(ASK.format(queries=queries), tmp_path, **hub.environment, HF_HOME=str(tmp_path / "home"))
    assert "served True" in printed
    pages = json.loads(re.search("^pages (.*)$", printed, re.M)[1])

    gallery = Gallery(space)
    encoders = {}
    for label, source in gallery.models.items():
        options = {"revision": source["revision"]}
        model = GCLModel.from_encoder(source["name"], **options).eval()
        encoders[label] = encoder_of(model, GCLProcessor.from_encoder(source["name"], **options))
    (search,) = [fn.fn for fn in build_app(gallery, encoders).fns.values() if fn.api_name == "search"]
    for page, query in zip(pages, queries, strict=True):
        assert page == search(*query) and page.count("<li ") == 2 * 12
    assert len(set(pages)) == 3
    tuned, base = (re.findall(r"cosine with the query\">([\d.-]+)", part) for part in pages[0].split("</section>")[:2])
    assert tuned != base


def test_what_a_space_cannot_load_is_refused_first(hub, pinned, clip_folder, tmp_path):
    for model, revision, message in (
        (str(clip_folder), None, "is a folder, but a Space loads its models from the Hub: upload it with gcl push"),
        ("org/clip", pinned[1], "org/clip is not a GCL checkpoint"),
        ("org/absent", None, "the Hub has no org/absent, or you may not read it"),
        ("org/clip-gcl", "absent", "the Hub has no org/clip-gcl at absent"),
        ("no id/at/all", None, "neither a folder nor a Hub id"),
    ):
        with pytest.raises(ValueError, match=message):
            write_space(model, None, tmp_path / "space", name="pairs", revision=revision)
        assert not (tmp_path / "space").exists()
