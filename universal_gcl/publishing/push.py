"""Pushes a saved folder to the Hub, completely or not at all.

- The files are uploaded first. Then one commit makes them visible, so that nobody sees half of an update. Its parent is
  the commit that was the latest at the start: if somebody else has pushed since, it fails and overwrites nothing. The
  same commit removes weights, code, adapters and benchmarks that the folder no longer holds; the repository's other
  files stay.
- An adapter is pushed together with the model that it was merged into. On the Hub it names its base by a Hub id: a base
  that is a local folder is pushed first, to its own repository.
- The pushed card's code examples load the id that it is pushed to. The local folder is not changed.
"""

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
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
FIRST_WAIT = 2.0  # seconds; doubled after each failure, unless the Hub says how long to wait
LONGEST_WAIT = 300.0
Result = TypeVar("Result")
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
    """Push a folder that training or a converter saved.

    Args:
        folder: the folder; see `check_folder`.
        repo_id: `"org/name"`; the repository is made if it doesn't exist.
        private: whether a new repository is private.
        revision: branch to commit to instead of main; it is made if it doesn't exist.
        message: message of the commit.
        adapter_base_id: Hub id of the base of the folder's adapter; if the base is a local folder, it is pushed there.
            By default the id that the adapter names or, if it names a folder, `<repo_id>-base`.
        token: by default that of `hf auth login`, or HF_TOKEN.

    Returns:
        URL of the commit.

    Raises:
        ValueError: the folder is no model folder or lacks files; there is no token, or it may not write there; the Hub
            refuses the model card; the adapter was trained on another base than the one on the Hub; somebody else has
            pushed to the repository. In all these cases, no file in `repo_id` has changed, but a new repository may be
            left empty, and the adapter's base may have been pushed.
        ConnectionError: the Hub could not be reached or failed, ATTEMPTS times. What has changed is the same as after a
            ValueError.
    """
    folder = Path(folder)
    check_folder(folder)
    token = check_may_push(repo_id, token)
    _check_card(_files(folder, repo_id)["README.md"])
    api = HfApi(token=token)
    base_id: str | None = None
    changed: dict[str, bytes] = {}
    if (folder / ADAPTER_FOLDER).is_dir():
        base_id = _base_on_hub(folder / ADAPTER_FOLDER, adapter_base_id, repo_id, private, token)
        changed[f"{ADAPTER_FOLDER}/{ADAPTER_CONFIG}"] = _with_base(folder / ADAPTER_FOLDER, base_id)
    files = _files(folder, repo_id, base_id) | changed
    _retry(lambda: api.create_repo(repo_id, private=private, exist_ok=True), repo_id)
    if revision is not None:
        _retry(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True), repo_id)
    parent = _retry(lambda: api.model_info(repo_id, revision=revision), repo_id).sha

    def commit() -> str:
        # if the answer to a successful commit was lost, the retry finds the same files there and commits nothing
        held = api.list_repo_files(repo_id, revision=revision)
        stale = [name for name in filter_repo_objects(held, allow_patterns=list(_STALE)) if name not in files]
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()
        ]
        operations += [CommitOperationDelete(path_in_repo=name) for name in stale]
        try:
            info = api.create_commit(
                repo_id, operations, commit_message=message, revision=revision, parent_commit=parent
            )
        except ValueError as error:  # the card's metadata are invalid; the Hub's other errors are no ValueErrors
            raise ValueError(f"{repo_id} was not pushed: {error}. Nothing has changed in {repo_id}") from error
        return info.commit_url

    return _retry(commit, repo_id)


def _files(folder: Path, repo_id: str, base_id: str | None = None) -> dict[str, Path | bytes]:
    """The files to push: path in the repository → file or content."""
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    names = [*filter_repo_objects(paths, ignore_patterns=list(_NOT_PUSHED))]
    names += filter_repo_objects(paths, allow_patterns=[".eval_results/*.yaml"])
    files: dict[str, Path | bytes] = {name: paths[name] for name in names}
    return files | {name: text.encode() for name, text in files_for(folder, repo_id, base_id).items()}


def _check_card(card: Path | bytes) -> None:
    """Check that huggingface_hub can read the card. `create_commit` asks the Hub too, before it uploads anything."""
    text = card.decode() if isinstance(card, bytes) else card.read_text(encoding="utf-8")
    try:
        ModelCard(text)
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"the metadata at the top of README.md can't be read: {error}. Nothing was pushed") from error


def _base_on_hub(adapter: Path, base_id: str | None, repo_id: str, private: bool, token: str) -> str:
    """Hub id of the adapter's base. A local base is pushed first; its weights must be those of the adapter's training.

    Raises:
        ValueError: the base is missing, or has other weights.
    """
    base, checksums = adapter_base(adapter), read_base_checksums(adapter)
    folder = Path(base) if Path(base).is_absolute() else None
    base_id = base_id or (f"{repo_id}-base" if folder else base)
    held = _retry(lambda: _weights_on_hub(HfApi(token=token), base_id), base_id)
    if held == checksums:
        return base_id
    if held is not None:
        raise ValueError(
            f"the adapter in {adapter} was trained on another base than {base_id} on the Hub: pass the right one, or a "
            "new repository for it, with --adapter-base"
        )
    if folder is None:
        raise ValueError(
            f"{base_id}, the base of the adapter in {adapter}, is not on the Hub: pass its id with --adapter-base"
        )
    if not folder.is_dir():
        raise ValueError(
            f"the base of the adapter in {adapter}, {folder}, no longer exists: pass one on the Hub with "
            f"--adapter-base, or remove {adapter} to push only the merged model"
        )
    if weight_checksums(folder) != checksums:
        raise ValueError(
            f"the weights in {folder} have changed since the adapter in {adapter} was trained on them: train it again"
        )
    push_folder(folder, base_id, private=private, message=f"Upload the base of {repo_id}", token=token)
    return base_id


def _weights_on_hub(api: HfApi, repo_id: str) -> dict[str, str] | None:
    """SHA-256 of each weight file of a repository, by name; None if there is no such repository."""
    try:
        files = [item for item in api.list_repo_tree(repo_id) if isinstance(item, RepoFile)]
    except RepositoryNotFoundError:
        return None
    return {file.path: file.lfs.sha256 for file in files if file.lfs and file.path.endswith(".safetensors")}


def _with_base(adapter: Path, base_id: str) -> bytes:
    """The adapter's configuration for the Hub, which names a base that others can load."""
    config = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    return json.dumps(config | {"base_model_name_or_path": base_id}, indent=2, sort_keys=True).encode()


def check_folder(folder: Path) -> None:
    """Check that a folder can be pushed.

    Raises:
        ValueError: the folder is no GCL checkpoint, lacks weights or a model card, or holds damaged or partly written
            files, or a link to a folder, whose files would be left out.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder} is not a model folder: it has no config.json") from None
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'} is not valid JSON: {error}") from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != "gcl":
        raise ValueError(f"{folder} is not a GCL checkpoint but a {kind!r} model: push it with `hf upload`")
    partial = sorted(path.name for path in folder.rglob("*.partial"))
    if partial:
        raise ValueError(f"{folder} holds a file that was not written completely, {partial[0]}: save the model again")
    links = sorted(path.name for path in folder.rglob("*") if path.is_symlink() and path.is_dir())
    if links:
        raise ValueError(f"{folder / links[0]} is a link to a folder, which is not followed: copy the files instead")
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
        remedy = f"Write it with `gcl card {folder}`" if only_card else "Train or convert it again"
        raise ValueError(f"{folder} is not complete: it lacks {', '.join(missing)}. {remedy}")
    for name in files:
        try:
            with safe_open(folder / name, "pt"):  # compares the header with the size of the file
                pass
        except SafetensorError as error:
            raise ValueError(f"{folder / name} is damaged or truncated ({error}): save the model again") from error


def check_may_push(repo_id: str, token: str | None = None) -> str:
    """Ask the Hub whether the token may push to the owner of `repo_id`. Call it before hours of training.

    Returns:
        The token to push with.

    Raises:
        ValueError: the id is not of the form `org/name`, there is no token, the Hub doesn't know it, or its user is not
            a member of `org`.
        ConnectionError: the Hub can't be reached.
    """
    check_hub_id(repo_id)
    if "/" not in repo_id:
        raise ValueError(f"{repo_id!r} has no owner: push to ORGANISATION_OR_USER/NAME")
    token = token or get_token()
    if token is None:
        raise ValueError(f"there is no token to push to {repo_id}: run `hf auth login`, or set HF_TOKEN")
    user = _retry(lambda: HfApi(token=token).whoami(), repo_id)
    owner, owners = repo_id.split("/")[0], [user["name"], *(org["name"] for org in user.get("orgs", []))]
    if owner not in owners:
        raise ValueError(f"{user['name']} may not push to {repo_id}, only to repositories of {', '.join(owners)}")
    return token


def _retry(call: Callable[[], Result], repo_id: str) -> Result:
    """Call until the network and the Hub work, at most ATTEMPTS times. Return the result.

    Raises:
        ValueError: the Hub refuses, so another attempt would be useless.
        ConnectionError: every attempt failed.
    """
    wait = FIRST_WAIT
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return call()
        except (HTTPError, RuntimeError) as raised:  # an HTTPError may also come from the network
            # huggingface_hub wraps an error in the upload of a file in a RuntimeError
            error = raised if isinstance(raised, HTTPError) else raised.__cause__
            if not isinstance(error, HTTPError):
                raise
            status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
            if status is not None and status not in _TRY_LATER:
                raise ValueError(_explain(status, repo_id, error)) from error
            reason = f"status {status}" if status else f"{type(error).__name__}: {error}"
            if attempt == ATTEMPTS:
                raise ConnectionError(
                    f"{repo_id} was not pushed: the Hub failed {ATTEMPTS} times, the last time with {reason}. Nothing "
                    "has changed in it; push again later"
                ) from error
            pause = min(_requested_wait(error) or wait, LONGEST_WAIT)
            logger.warning(f"the Hub failed ({reason}); attempt {attempt + 1} of {ATTEMPTS} in {pause:.0f} s")
            time.sleep(pause)
            wait *= 2
    raise AssertionError("the last attempt returns or raises")


def _requested_wait(error: HTTPError) -> float | None:
    """How many seconds the Hub asks to wait, if it says so."""
    if not isinstance(error, HfHubHTTPError):
        return None
    try:
        return float(error.response.headers.get("retry-after", ""))
    except ValueError:
        return None


def _explain(status: int, repo_id: str, error: HTTPError) -> str:
    """What a refusal means and what to do about it."""
    reasons = {
        401: "the Hub does not accept the token: run `hf auth login` again, or set HF_TOKEN to a valid one",
        403: f"the token may not write to {repo_id}: make one with write access to it",
        404: f"{repo_id} or its branch doesn't exist, or the token may not see it",
        412: f"somebody else has pushed to {repo_id} during this upload: look at what is there, then push again",
    }
    return f"{reasons.get(status, f'the Hub refused {repo_id} ({error})')}. Nothing has changed in {repo_id}"
