"""A saved folder onto the Hub: complete or not at all.

- Files are uploaded first, then one commit makes them visible, on top of the commit that was seen at the start: others
  never see half of an update, and what someone else pushed meanwhile is not overwritten. Weights, code, adapter and
  benchmarks that the folder no longer holds are removed in the same commit; other files of the repository stay.
- An adapter is pushed with the model that it was merged into, and names its base by a Hub id: a base that is a folder
  here is pushed first, to a repository of its own.
- The card that is pushed loads the id that it is pushed to; the folder stays as it was.
"""

import json
import logging
import time
from pathlib import Path

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError, RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from safetensors import SafetensorError, safe_open

from universal_gcl.publishing.benchmarks import OURS
from universal_gcl.publishing.card_facts import check_hub_id
from universal_gcl.publishing.hub_folder import ADAPTER_FOLDER, files_for
from universal_gcl.retrieval.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BASE,
    adapter_base,
    read_base_checksums,
    weight_checksums,
)

logger = logging.getLogger(__name__)

ATTEMPTS = 5
FIRST_WAIT = 2.0  # seconds; doubled each time, unless the Hub says how long
LONGEST_WAIT = 300.0
_STALE = ("*.safetensors", "*.safetensors.index.json", "*.py", f"{ADAPTER_FOLDER}/*", "benchmarks/*.json", OURS)
_NOT_PUSHED = ("checkpoint-*/**", "runs/**", "*.partial", ".*", "**/.*", "**/__pycache__/**")
_TRY_LATER = (408, 409, 425, 429, 500, 502, 503, 504)


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str = "Upload a GCL model",
    adapter_base_id: str | None = None,
    token: str | None = None,
) -> str:
    """
    Push a folder that training or a converter saved.

    Args:
        repo_id: `"org/name"`; made if it is not there.
        private: of a repository that is made now.
        revision: branch to commit to instead of main; made if it is not there.
        adapter_base_id: where the base of the folder's adapter is on the Hub, or is pushed to; by default the id that
            the adapter names, or `<repo_id>-base` where it names a folder.
        token: by default that of `hf auth login`, or HF_TOKEN.

    Returns:
        URL of the commit.

    Raises:
        ValueError: no model folder, or one that lacks files; no token, or one that may not write there; a model card
            that the Hub refuses; an adapter for another base than that on the Hub; the repository changed meanwhile.
            No file has changed in `repo_id` then; a new repository may stay empty, and the adapter's base was pushed.
        ConnectionError: the Hub could not be reached, or refused, ATTEMPTS times. The same holds.
    """
    folder = Path(folder)
    check_folder(folder)
    token = check_may_push(repo_id, token)
    _check_card(_files(folder, repo_id)["README.md"])
    api = HfApi(token=token)
    base_id, changed = None, {}
    if (folder / ADAPTER_FOLDER).is_dir():
        base_id = _base_on_hub(folder / ADAPTER_FOLDER, adapter_base_id, repo_id, private, api)
        changed[f"{ADAPTER_FOLDER}/{ADAPTER_CONFIG}"] = _with_base(folder / ADAPTER_FOLDER, base_id)
    files = _files(folder, repo_id, base_id) | changed
    _persist(lambda: api.create_repo(repo_id, private=private, exist_ok=True), repo_id)
    if revision is not None:
        _persist(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True), repo_id)
    seen = _persist(lambda: api.model_info(repo_id, revision=revision), repo_id).sha

    def commit():
        # a commit whose answer was lost is met again as a folder that the repository holds already: nothing to do
        held = api.list_repo_files(repo_id, revision=revision)
        stale = [name for name in filter_repo_objects(held, allow_patterns=list(_STALE)) if name not in files]
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()]
        operations += [CommitOperationDelete(path_in_repo=name) for name in stale]
        options = {"commit_message": message, "revision": revision, "parent_commit": seen}
        try:
            return api.create_commit(repo_id, operations, **options).commit_url
        except ValueError as error:  # of the card's metadata; what else the Hub says is no ValueError
            raise ValueError(f"{repo_id} was not pushed: {error}. Nothing has changed in {repo_id}") from error

    return _persist(commit, repo_id)


def _files(folder, repo_id, base_id=None):
    """Path in the repository → file or bytes, of what is pushed."""
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    names = [*filter_repo_objects(paths, ignore_patterns=list(_NOT_PUSHED))]
    names += filter_repo_objects(paths, allow_patterns=[".eval_results/*.yaml"])
    changed = {name: text.encode() for name, text in files_for(folder, repo_id, base_id).items()}
    return {name: paths[name] for name in names} | changed


def _check_card(card):
    """What huggingface_hub makes of it; the Hub itself is asked by `create_commit`, before it uploads anything."""
    text = card.decode() if isinstance(card, bytes) else card.read_text(encoding="utf-8")
    try:
        ModelCard(text)
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"the metadata at the head of README.md can't be read: {error}. Nothing was pushed") from error


def _base_on_hub(adapter, base_id, repo_id, private, api):
    """Hub id of an adapter's base, which holds the weights that the adapter was trained on; pushed if need be."""
    base, checksums = adapter_base(adapter), read_base_checksums(adapter)
    folder = Path(base) if Path(base).is_absolute() else None
    base_id = base_id or (f"{repo_id}-base" if folder else base)
    held = _persist(lambda: _weights_on_hub(api, base_id), base_id)
    if held is None and folder is None:
        raise ValueError(
            f"{base_id}, the base of the adapter in {adapter}, is not on the Hub: name it by --adapter-base"
        )
    if held is None:
        if not folder.is_dir():
            raise ValueError(
                f"the base of the adapter in {adapter}, {folder}, is gone: name one on the Hub by --adapter-base, or "
                f"remove {adapter} to push the merged model alone"
            )
        if weight_checksums(folder) != checksums:
            raise ValueError(f"the adapter in {adapter} is for another base than {folder} holds now: train it again")
        push_folder(folder, base_id, private=private, message=f"Upload the base of {repo_id}", token=api.token)
    elif held != checksums:
        raise ValueError(
            f"the adapter in {adapter} is for another base than {base_id} on the Hub: name the right one, or a new "
            "repository for it, by --adapter-base"
        )
    return base_id


def _weights_on_hub(api, repo_id):
    """SHA-256 of each weight file of a repository, by name; None where there is no such repository."""
    try:
        files = [item for item in api.list_repo_tree(repo_id) if getattr(item, "lfs", None)]
    except RepositoryNotFoundError:
        return None
    return {file.path: file.lfs.sha256 for file in files if file.path.endswith(".safetensors")}


def _with_base(adapter, base_id):
    """The adapter's configuration as it is pushed: with a base that others can load."""
    config = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    return json.dumps(config | {"base_model_name_or_path": base_id}, indent=2, sort_keys=True).encode()


def check_folder(folder: Path) -> None:
    """
    Raises:
        ValueError: the folder is no GCL checkpoint, misses weights or a model card, holds files that are damaged or
            that writing left half done, or a link to a folder, whose files would be left out.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder} is no model folder: there is no config.json") from None
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'} is no JSON: {error}") from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != "gcl":
        raise ValueError(f"{folder} is no GCL checkpoint but a {kind!r} model: push it by `hf upload`")
    partial = sorted(path.name for path in folder.rglob("*.partial"))
    if partial:
        raise ValueError(f"{folder} holds a file that was written in part, {partial[0]}: save the model again")
    links = sorted(path.name for path in folder.rglob("*") if path.is_symlink() and path.is_dir())
    if links:
        raise ValueError(f"{folder / links[0]} is a link to a folder, which is not followed: copy its files there")
    index = folder / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.is_file():
        try:
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is damaged ({error!r}): save the model again") from error
    missing = [name for name in (*files, "processor_config.json", "README.md") if not (folder / name).is_file()]
    if (folder / ADAPTER_FOLDER).is_dir():
        files.append(f"{ADAPTER_FOLDER}/{ADAPTER_WEIGHTS}")
        missing += [
            f"{ADAPTER_FOLDER}/{name}"
            for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, BASE)
            if not (folder / ADAPTER_FOLDER / name).is_file()
        ]
    if missing:
        only_card = missing == ["README.md"] and (folder / "card.json").is_file()
        remedy = f"Write it by `gcl card {folder}`" if only_card else "Train or convert it again"
        raise ValueError(f"{folder} is not complete: there is no {', '.join(missing)}. {remedy}")
    for name in files:
        try:
            with safe_open(folder / name, "pt"):  # compares the tensors that it names with the file's size
                pass
        except SafetensorError as error:
            raise ValueError(f"{folder / name} is damaged or cut off ({error}): save the model again") from error


def check_may_push(repo_id: str, token: str | None = None) -> str:
    """
    The token to push with, after asking the Hub whose it is. Worth doing before hours of training.

    Raises:
        ValueError: the id is no `org/name`, there is no token, the Hub does not know it, or its user is not of `org`.
        ConnectionError: the Hub cannot be reached.
    """
    check_hub_id(repo_id)
    if "/" not in repo_id:
        raise ValueError(f"{repo_id!r} names no owner: push to ORGANISATION_OR_USER/NAME")
    token = token or get_token()
    if token is None:
        raise ValueError(f"there is no token to push {repo_id} with: run `hf auth login`, or set HF_TOKEN")
    user = _persist(lambda: HfApi(token=token).whoami(), repo_id)
    owner, owners = repo_id.split("/")[0], [user["name"], *(org["name"] for org in user.get("orgs", []))]
    if owner not in owners:
        raise ValueError(f"{user['name']} may not push to {repo_id}: the token's owners are {', '.join(owners)}")
    return token


def _persist(call, repo_id):
    """What `call` returns, at the first of ATTEMPTS in which the network and the Hub are well."""
    wait = FIRST_WAIT
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return call()
        except (HTTPError, RuntimeError) as error:  # of the network too
            if not isinstance(error, HTTPError):  # huggingface_hub wraps what befell the upload of a file
                if not isinstance(error.__cause__, HTTPError):
                    raise
                error = error.__cause__
            status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
            if status is not None and status not in _TRY_LATER:
                raise ValueError(_explain(status, repo_id, error)) from error
            why = f"status {status}" if status else f"{type(error).__name__}: {error}"
            if attempt == ATTEMPTS:
                raise ConnectionError(
                    f"{repo_id} was not pushed, the Hub failed {ATTEMPTS} times, at last with {why}. Nothing has "
                    "changed in it; push again later"
                ) from error
            pause = min(_asked_to_wait(error) or wait, LONGEST_WAIT)
            logger.warning(f"the Hub failed ({why}); attempt {attempt + 1} of {ATTEMPTS} in {pause:.0f} s")
            time.sleep(pause)
            wait *= 2


def _asked_to_wait(error) -> float | None:
    if not isinstance(error, HfHubHTTPError):
        return None
    try:
        return float(error.response.headers.get("retry-after"))
    except (TypeError, ValueError):
        return None


def _explain(status, repo_id, error):
    reasons = {
        401: "the Hub does not accept the token: run `hf auth login` again, or set HF_TOKEN to a valid one",
        403: f"the token may not write to {repo_id}: make one with write access to it",
        404: f"{repo_id} or its branch is not there, or the token may not see it",
        412: f"{repo_id} has changed while this was uploaded: look at what was pushed there, then push again",
    }
    return f"{reasons.get(status, f'the Hub refused {repo_id} ({error})')}. Nothing has changed in {repo_id}"
