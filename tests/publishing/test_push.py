"""Pushing folders to a Hub over real HTTP: completely, in one commit, despite network faults; and loading them."""

import json
from pathlib import Path

import pytest
import torch

import universal_gcl.publishing.push
from modeling_gcl import GCLModel
from tests.support.backbones import tiny_encoder, tiny_processor
from tests.support.doors import run_outside
from tests.support.hub_on_loopback import TOKEN
from universal_gcl.publishing.push import check_folder, push_folder

ROOT = Path(__file__).parents[2]
LOAD = """
import json
from transformers import AutoModel, AutoProcessor
options = {{"revision": {revision!r}, "trust_remote_code": True}}
model, processor = (auto.from_pretrained({repo_id!r}, **options) for auto in (AutoModel, AutoProcessor))
print(json.dumps(model.encode(["A red bird."], processor).tolist()))
"""


@pytest.fixture(scope="module")
def model():
    return GCLModel.from_encoder(tiny_encoder("clip")).eval()


@pytest.fixture
def folder(model, tmp_path):
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tiny_processor("clip").save_pretrained(folder)
    (folder / "README.md").write_text("# A card\n")
    (folder / "pictures").mkdir()
    (folder / "pictures" / "nine_way.png").write_bytes(b"png")
    return folder


@pytest.fixture
def push(hub, monkeypatch, capfd):
    """`push_folder` to org/clip-gcl; `push.waits` are the pauses that it would have made."""

    def push(folder, repo_id="org/clip-gcl", token=TOKEN, **options):
        push.waits.clear()
        monkeypatch.setenv("HF_TOKEN", token)
        try:
            return push_folder(folder, repo_id, **options)
        finally:
            assert TOKEN not in "".join(capfd.readouterr())

    push.waits = []
    monkeypatch.setattr(universal_gcl.publishing.push.time, "sleep", push.waits.append)
    return push


def on_disk(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pushed(hub, repo_id="org/clip-gcl", branch="main"):
    return {name: content for name, content in hub.files(repo_id, branch).items() if name != ".gitattributes"}


def test_a_pushed_folder_loads_where_our_package_is_not(hub, push, folder, model, tmp_path):
    url = push(folder, private=True)
    commits = hub.repos["org/clip-gcl"]["main"]
    assert len(commits) == 2 and url.endswith(commits[-1]["sha"]) and push.waits == []
    assert pushed(hub) == on_disk(folder) and hub.private == {"org/clip-gcl"}
    code = LOAD.format(repo_id="org/clip-gcl", revision=commits[-1]["sha"])
    printed = run_outside(code, tmp_path, **hub.environment, HF_HOME=str(tmp_path / "home"))
    expected = model.encode(["A red bird."], tiny_processor("clip"))
    torch.testing.assert_close(torch.tensor(json.loads(printed.splitlines()[-1])), expected, atol=1e-5, rtol=0)


def test_pushed_again_it_replaces_weights_and_code_and_keeps_the_rest(hub, push, folder):
    push(folder)
    hub.files("org/clip-gcl")["model-00001-of-00002.safetensors"] = b"old"
    hub.files("org/clip-gcl")["old_gcl.py"] = b"old"
    hub.files("org/clip-gcl")["notes.txt"] = b"kept"
    (folder / "README.md").write_text("# A better card\n")
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "optimizer.pt").write_bytes(b"not for the Hub")
    push(folder)
    expected = {name: content for name, content in on_disk(folder).items() if not name.startswith("checkpoint-")}
    assert pushed(hub) == expected | {"notes.txt": b"kept"}
    commits = len(hub.repos["org/clip-gcl"]["main"])
    push(folder)
    assert len(hub.repos["org/clip-gcl"]["main"]) == commits  # nothing new, no empty commit


def test_a_branch_leaves_main_alone(hub, push, folder):
    push(folder, revision="next")
    assert list(pushed(hub)) == [] and pushed(hub, branch="next") == on_disk(folder)


@pytest.mark.parametrize(
    ("fault", "one_of"),
    [
        # the upload of the weights breaks off: huggingface_hub retries by itself; old versions don't, so that we do
        (("PUT", "/__lfs__/", None), [1.0, 2.0]),
        (("POST", "/commit/", 503), [2.0]),
        (("POST", "/commit/", None, "after"), [2.0]),  # committed, but the answer is lost
        (("POST", "/commit/", 429, {"retry-after": "7"}), [7.0]),
        (("POST", "/api/repos/create", 500), [2.0]),
    ],
)
def test_faults_of_network_and_hub_are_outlived(hub, push, folder, fault, one_of):
    method, part, status, *more = fault
    headers = next((item for item in more if isinstance(item, dict)), None)
    hub.fail(method, part, status, headers=headers, after="after" in more)
    push(folder)
    assert not hub.faults and len(push.waits) == 1 and push.waits[0] in one_of
    assert pushed(hub) == on_disk(folder) and len(hub.repos["org/clip-gcl"]["main"]) == 2


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (403, "may not write to org/clip-gcl"),
        (404, "doesn't exist, or the token may not see it"),
        (412, "somebody else has pushed to org/clip-gcl"),
    ],
)
def test_what_the_hub_refuses_changes_nothing_and_says_what_to_do(hub, push, folder, status, message):
    hub.fail("POST", "/commit/", status)
    with pytest.raises(ValueError, match=f"{message}.*Nothing has changed in org/clip-gcl$"):
        push(folder)
    assert push.waits == [] and list(pushed(hub)) == []


def test_a_card_that_the_hub_refuses_is_not_pushed(hub, push, folder):
    hub.fail("POST", "/api/validate-yaml", 400)
    with pytest.raises(ValueError, match="(?s)Invalid metadata in README.md.*Nothing has changed in org/clip-gcl"):
        push(folder)
    assert list(pushed(hub)) == []
    (folder / "README.md").write_text("---\ntags: [\n---\n")
    with pytest.raises(ValueError, match="(?s)top of README.md can't be read.*Nothing was pushed"):
        push(folder, "org/other")
    assert set(hub.repos) == {"org/clip-gcl"}


def test_evaluation_results_go_along_and_old_ones_leave(hub, push, folder):
    (folder / ".eval_results").mkdir()
    (folder / ".eval_results" / "gcl_mbeir_local.yaml").write_text("- value: 1\n")
    (folder / ".eval_results" / "by_others.yaml").write_text("- value: 2\n")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "secret").write_text("not for the Hub")
    push(folder)
    hub.files("org/clip-gcl")["benchmarks/mbeir.json"] = b"of an older model"
    expected = {name for name in on_disk(folder) if name != ".cache/secret"}
    assert pushed(hub).keys() == expected | {"benchmarks/mbeir.json"}
    (folder / ".eval_results" / "gcl_mbeir_local.yaml").unlink()
    push(folder)
    assert pushed(hub).keys() == expected - {".eval_results/gcl_mbeir_local.yaml"}


def test_a_hub_that_stays_down_is_given_up(hub, push, folder):
    hub.fail("POST", "/commit/", 503, times=5)
    with pytest.raises(ConnectionError, match="failed 5 times, the last time with status 503"):
        push(folder)
    assert push.waits == [2.0, 4.0, 8.0, 16.0] and list(pushed(hub)) == []


def test_an_upload_that_never_ends_well_is_given_up(hub, push, folder):
    hub.fail("PUT", "/__lfs__/", None, times=1000)
    with pytest.raises(ConnectionError, match="failed 5 times, the last time with RemoteProtocolError"):
        push(folder)
    assert list(pushed(hub)) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token": ""}, "run `hf auth login`, or set HF_TOKEN"),
        ({"token": "hf_wrong"}, "does not accept the token"),
        ({"repo_id": "others/clip-gcl"}, "tester may not push to others/clip-gcl, only to repositories of tester, org"),
        ({"repo_id": "clip-gcl"}, "'clip-gcl' has no owner"),
        ({"repo_id": "org/a b"}, "no id on the Hub"),
    ],
)
def test_tokens_and_owners(hub, push, folder, options, message):
    with pytest.raises(ValueError, match=message):
        push(folder, **options)
    assert hub.repos == {}


def spoil_config(folder):
    (folder / "config.json").write_text('{"model_type": "clip"}')


def cut_off_weights(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])


def link_adapter(folder):
    (folder / "adapter").symlink_to(folder / "pictures", target_is_directory=True)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_config, "not a GCL checkpoint but a 'clip' model"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is not valid JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "not a GCL checkpoint but a None model"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("{"), "index.json is damaged"),
        (cut_off_weights, "model.safetensors is damaged or truncated"),
        (link_adapter, "adapter is a link to a folder, which is not followed: copy the files instead"),
        (lambda folder: (folder / "config.json").unlink(), "is not a model folder: it has no config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "is not complete: it lacks model.safetensors"),
        (lambda folder: (folder / "README.md").unlink(), "is not complete: it lacks README.md"),
        (lambda folder: (folder / "README.md").rename(folder / "card.json"), "README.md. Write it with `gcl card "),
        (lambda folder: (folder / "a.json.partial").touch(), "not written completely, a.json.partial"),
    ],
)
def test_folders_that_are_not_whole_are_refused_before_the_hub_is_asked(folder, spoil, message):
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        check_folder(folder)
