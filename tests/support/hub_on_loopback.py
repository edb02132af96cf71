"""A Hub on this machine, for tests that push and load over real HTTP: repositories of models, commits, LFS, and faults.

    with hub_on_loopback() as hub:
        hub.fail("POST", "/commit/", 503)  # the next such request
        subprocess.run(..., env=os.environ | hub.environment)

`environment` is for a fresh process: huggingface_hub reads HF_ENDPOINT when it is imported. The token of the user
`tester`, who belongs to `org`, is TOKEN.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_loopbacktoken"
LFS = (".safetensors", ".bin", ".png", ".onnx")
_DATE = "2026-01-01T00:00:00.000Z"


class Hub:
    """
    Attributes:
        repos: id → branch → commits, oldest first: `{"sha", "message", "files": path → bytes}`.
        log: (method, path, status) of all requests.
    """

    def __init__(self):
        self.repos, self.blobs, self.log, self.faults = {}, {}, [], []
        self.private: set[str] = set()
        self.lock = threading.RLock()

    def fail(self, method: str, part: str, status: int | None, *, headers=None, after: bool = False, times: int = 1):
        """The next requests whose path holds `part` are answered by `status`; None cuts the connection. `after`: when
        the request was served, so that only its answer is lost."""
        self.faults += [(method, part, status, headers or {}, after)] * times

    def fault(self, method, path):
        for fault in self.faults:
            if fault[0] == method and fault[1] in path:
                self.faults.remove(fault)
                return fault
        return None

    def files(self, repo_id: str, branch: str = "main") -> dict[str, bytes]:
        return self.repos[repo_id][branch][-1]["files"]

    def commit(self, repo_id, branch, files, message):
        commits = self.repos[repo_id].setdefault(branch, [])
        sha = hashlib.sha1(f"{repo_id} {branch} {len(commits)} {message}".encode()).hexdigest()
        commits.append({"sha": sha, "message": message, "files": files})
        return sha

    def find(self, repo_id, revision):
        for branch, commits in self.repos[repo_id].items():
            for commit in commits if revision != branch else commits[-1:]:
                if revision in (branch, commit["sha"]):
                    return commit
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def _serve(self):
        path, data = unquote(urlsplit(self.path).path), self._body()
        with self.hub.lock:
            fault = self.hub.fault(self.command, path)
            if fault is not None and not fault[4]:
                return self._break(fault)
            self.broken = fault
            return self._route(path, data)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    @property
    def hub(self):
        return self.server.hub

    def _body(self):
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while length := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(length)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _break(self, fault):
        self.hub.log.append((self.command, unquote(self.path), fault[2]))
        if fault[2] is None:
            self.close_connection = True
            self.connection.close()
            return
        self._answer(fault[2], {"error": "made by the test"}, fault[3], broken=True)

    def _send(self, status, body=b"", headers=None):
        if self.broken is not None:
            fault, self.broken = self.broken, None
            return self._break(fault)
        self.hub.log.append((self.command, unquote(self.path), status))
        self._answer(status, body, headers)

    def _answer(self, status, body, headers=None, broken=False):
        if isinstance(body, (dict, list)):
            body = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        if "Content-Type" not in (headers or {}):
            self.send_header("Content-Type", "application/json")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _error(self, status, code, message):
        self._send(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})

    def _route(self, path, data):
        known = self.headers.get("Authorization", "") == f"Bearer {TOKEN}"
        if path == "/api/whoami-v2":
            if not known:
                return self._error(401, "Unauthorized", "Invalid credentials in Authorization header")
            token = {"role": "write", "displayName": "t"}
            user = {"type": "user", "name": "tester", "orgs": [{"name": "org"}], "auth": {"accessToken": token}}
            return self._send(200, user)
        if path == "/api/validate-yaml":
            return self._send(200, {"errors": [], "warnings": []})
        if found := re.fullmatch(r"/__lfs__/([0-9a-f]{64})", path):
            if self.command == "PUT":
                if hashlib.sha256(data).hexdigest() != found[1]:
                    return self._error(400, "BadRequest", "other bytes than announced")
                self.hub.blobs[found[1]] = data
                return self._send(200)
            return self._file(self.hub.blobs[found[1]], found[1])
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._resolve(*found.groups())
        if self.command != "GET" and not known:
            return self._error(401, "Unauthorized", "Invalid username or password.")
        if path == "/api/repos/create":
            return self._create(json.loads(data))
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self._batch(json.loads(data)["objects"])
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(\w+)/([^/]+)(?:/(.*))?)?", path):
            return self._of_model(*found.groups(), data)
        return self._error(404, "NotImplemented", f"{self.command} {path}")

    def _create(self, asked):
        repo_id = f"{asked.get('organization') or 'tester'}/{asked['name']}"
        url = f"http://{self.headers['Host']}/{repo_id}"
        if repo_id in self.hub.repos:
            return self._send(409, {"error": "You already created this model repo", "url": url})
        self.hub.repos[repo_id] = {}
        if asked.get("private") or asked.get("visibility") == "private":
            self.hub.private.add(repo_id)
        self.hub.commit(repo_id, "main", {".gitattributes": b"*.safetensors filter=lfs -text\n"}, "initial commit")
        return self._send(200, {"url": url, "name": repo_id, "id": repo_id})

    def _batch(self, objects):
        base = f"http://{self.headers['Host']}"
        answers = []
        for item in objects:
            upload = {"actions": {"upload": {"href": f"{base}/__lfs__/{item['oid']}"}}}
            answers.append({**item, **({} if item["oid"] in self.hub.blobs else upload)})
        kind = {"Content-Type": "application/vnd.git-lfs+json"}
        return self._send(200, {"transfer": "basic", "objects": answers}, kind)

    def _of_model(self, repo_id, what, revision, rest, data):
        if repo_id not in self.hub.repos:
            return self._error(404, "RepoNotFound", "Repository not found")
        if what == "branch":
            commits = self.hub.repos[repo_id]
            if revision in commits:
                return self._error(409, "Conflict", "Reference already exists")
            commits[revision] = list(commits["main"])
            return self._send(200, {})
        commit = self.hub.find(repo_id, revision or "main")
        if commit is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if what == "preupload":
            answers = []
            for item in json.loads(data)["files"]:
                mode = "lfs" if item["path"].endswith(LFS) else "regular"
                answer = {"path": item["path"], "uploadMode": mode, "shouldIgnore": False}
                if item["path"] in commit["files"]:
                    known = _described(item["path"], commit["files"][item["path"]])
                    answer["oid"] = known.get("lfs", known)["oid"]
                answers.append(answer)
            return self._send(200, {"files": answers})
        if what == "commit":
            return self._commit(repo_id, revision, commit, data)
        described = [_described(path, content) for path, content in sorted(commit["files"].items())]
        if what == "tree":
            recursive = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() in ("true", "1")
            inside = f"{rest.strip('/')}/" if rest else ""
            files = [item for item in described if item["path"].startswith(inside)]
            if not recursive:
                files = [item for item in files if "/" not in item["path"][len(inside) :]]
            return self._send(200, files)
        siblings = [{"rfilename": item["path"], "size": item["size"], "blobId": item["oid"]} for item in described]
        about = {"id": repo_id, "modelId": repo_id, "sha": commit["sha"], "lastModified": _DATE, "createdAt": _DATE}
        private = repo_id in self.hub.private
        return self._send(200, {**about, "private": private, "tags": [], "downloads": 0, "siblings": siblings})

    def _commit(self, repo_id, branch, head, data):
        files, message = dict(head["files"]), ""
        for line in data.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
                if value.get("parentCommit") not in (None, head["sha"]):
                    return self._error(412, "PreconditionFailed", "A commit has happened since. Please refresh")
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        sha = self.hub.commit(repo_id, branch, files, message)
        url = f"http://{self.headers['Host']}/{repo_id}/commit/{sha}"
        return self._send(200, {"success": True, "commitOid": sha, "commitUrl": url, "hookOutput": ""})

    def _resolve(self, repo_id, revision, path):
        if repo_id not in self.hub.repos:
            return self._error(404, "RepoNotFound", "Repository not found")
        commit = self.hub.find(repo_id, revision)
        if commit is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        headers = {"X-Repo-Commit": commit["sha"]}
        if path not in commit["files"]:
            return self._send(404, b"", headers | {"X-Error-Code": "EntryNotFound", "X-Error-Message": "no such file"})
        content = commit["files"][path]
        described = _described(path, content)
        if "lfs" not in described:
            return self._file(content, described["oid"], headers)
        # on another host, as the real one's: huggingface_hub keeps the token from it
        base = f"http://{self.headers['Host']}".replace("127.0.0.1", "localhost")
        sha256 = described["lfs"]["oid"]
        self.hub.blobs[sha256] = content
        headers |= {"Location": f"{base}/__lfs__/{sha256}", "X-Linked-Size": str(len(content))}
        return self._send(302, b"", headers | {"X-Linked-ETag": f'"{sha256}"', "ETag": f'"{described["oid"]}"'})

    def _file(self, content, etag, headers=None):
        headers = {"ETag": f'"{etag}"', "Accept-Ranges": "bytes", "Content-Type": "text/plain", **(headers or {})}
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(found[1]), int(found[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            return self._send(206, content[start : end + 1], headers)
        return self._send(200, content, headers)


def _described(path, content):
    """As the Hub lists a file; `oid` is git's hash of it, or of its LFS pointer."""
    stored, sha256 = content, hashlib.sha256(content).hexdigest()
    lfs = path.endswith(LFS)
    if lfs:
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(content)}\n"
        stored = text.encode()
    oid = hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()
    pointer = {"lfs": {"oid": sha256, "size": len(content), "pointerSize": len(stored)}} if lfs else {}
    return {"type": "file", "path": path, "oid": oid, "size": len(content), **pointer}


@contextmanager
def hub_on_loopback():
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads, server.hub = True, Hub()
    server.hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    server.hub.environment = {
        "HF_ENDPOINT": server.hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1,localhost",
    }
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        server.server_close()
