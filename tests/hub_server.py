"""A Hugging Face Hub on loopback: the real client speaks the real protocol to it, and any request can be made to fail.

    with LocalHub(users={"alice": "hf_alice"}, orgs={"acme": ["alice"]}) as hub:
        os.environ["HF_ENDPOINT"] = hub.url         # before huggingface_hub is imported: it is read only then
        hub.requests                                # "POST /api/repos/create 200", ...
        hub.fail(429, match="/commit/")             # the next such request is refused
        hub.cut("after", match="/commit/")          # the next such request is served, and its answer lost

Run as a script it serves until it is interrupted, and prints the environment a shell needs.
"""

import hashlib
import json
import re
import socket
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

from hub_repos import Blobs, RefusedError, Repo, validate_yaml

PREFIX = {"model": "", "dataset": "datasets/", "space": "spaces/", "kernel": "kernels/"}
PLURAL = {"models": "model", "datasets": "dataset", "spaces": "space", "kernels": "kernel"}

UNCOUNTED = ("/api/agent-harnesses",)  # what the client asks once a process, for its own sake


@dataclass
class Request:
    method: str
    path: str  # still quoted: a revision such as refs%2Fpr%2F1 is one segment
    query: dict[str, str]
    headers: Any
    body: bytes

    def json(self) -> dict[str, Any]:
        return json.loads(self.body or b"{}")


@dataclass
class Answer:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


def as_json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Answer:
    return Answer(status, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})})


@dataclass
class Fault:
    """status: what is answered; or where the connection is cut: "before" the request is served, "after" it (the
    answer is lost), or in the "middle" of the answer's body."""

    status: int | None
    cut: Literal["before", "after", "middle"] | None
    match: str
    times: int
    skip: int
    headers: dict[str, str]


class LocalHub:
    def __init__(self, users: dict[str, str] | None = None, orgs: dict[str, list[str]] | None = None):
        """users: name -> token. orgs: name -> users who may write there."""
        self.tokens = {token: user for user, token in (users or {"alice": "hf_alice"}).items()}
        self.orgs = orgs or {}
        self.repos: dict[tuple[str, str], Repo] = {}
        self.blobs = Blobs()
        self.requests: list[str] = []
        self.authorizations: list[tuple[str, str | None]] = []  # (path, Authorization header)
        self._faults: list[Fault] = []
        self._lock = threading.RLock()

    def __enter__(self) -> "LocalHub":
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.hub = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        # The same server as another origin: the client does not follow a redirect to the same one by hand, as it must.
        self.cdn = f"http://localhost:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()
        self.blobs.close()

    def fail(self, status: int, match: str = "", times: int = 1, skip: int = 0, headers: dict | None = None) -> None:
        """Refuse requests whose "METHOD path" contains `match`, `times` of them, after letting `skip` through."""
        self._faults.append(Fault(status, None, match, times, skip, headers or {}))

    def cut(self, cut: Literal["before", "after", "middle"], match: str = "", times: int = 1, skip: int = 0) -> None:
        """Cut the connection of such requests instead."""
        self._faults.append(Fault(None, cut, match, times, skip, {}))

    def heal(self) -> None:
        self._faults.clear()

    def fault_of(self, request: Request) -> Fault | None:
        if request.path in UNCOUNTED:
            return None
        with self._lock:
            for fault in self._faults:
                if fault.match in f"{request.method} {request.path}" and fault.times > 0:
                    if fault.skip > 0:
                        fault.skip -= 1
                    else:
                        fault.times -= 1
                        return fault
        return None

    def answer(self, request: Request, fault: Fault | None) -> Answer:
        try:
            if fault is not None and fault.status is not None:
                raise RefusedError(fault.status, "injected fault")
            with self._lock:
                return self._route(request, [unquote(part) for part in request.path.strip("/").split("/")])
        except RefusedError as refused:
            headers = {"X-Error-Message": refused.message, **(fault.headers if fault else {})}
            if refused.code:
                headers["X-Error-Code"] = refused.code
            return as_json({"error": refused.message, **refused.body}, refused.status, headers)

    def _user(self, request: Request) -> str | None:
        authorization = request.headers.get("Authorization")
        if authorization is None:
            return None
        user = self.tokens.get(authorization.removeprefix("Bearer "))
        if user is None:
            raise RefusedError(401, "Invalid credentials in Authorization header")
        return user

    def _may_write(self, user: str | None, namespace: str) -> bool:
        return user is not None and (user == namespace or user in self.orgs.get(namespace, []))

    def _repo(self, request: Request, type_: str, id_: str, *, write: bool = False, content: bool = False) -> Repo:
        user, repo = self._user(request), self.repos.get((type_, id_))
        owner = repo is not None and self._may_write(user, id_.split("/")[0])
        if repo is None or (repo.private and not owner):  # the same answer, so that it does not tell which
            message = "Invalid username or password." if user is None else "Repository not found"
            raise RefusedError(401 if user is None else 404, message, "RepoNotFound")
        if content and repo.gated and not owner:
            raise RefusedError(401 if user is None else 403, f"Access to {type_} {id_} is restricted", "GatedRepo")
        if write and not owner:
            raise RefusedError(401 if user is None else 403, "Forbidden: pass `create_pr=1` to create a Pull Request")
        return repo

    def _route(self, request: Request, parts: list[str]) -> Answer:
        match (request.method, *parts):
            case ("GET" | "HEAD", "_cdn", sha256):
                return _serve(request, self.blobs.read(sha256), {"ETag": f'"{sha256}"'})
            case ("PUT", "_lfs", sha256):
                if hashlib.sha256(request.body).hexdigest() != sha256:
                    raise RefusedError(400, "the content does not have this sha256")
                self.blobs.lfs[sha256] = request.body
                return Answer(headers={"ETag": f'"{sha256}"'})
            case ("POST", "_lfs", _, "verify"):
                wanted = request.json()
                stored = len(self.blobs.lfs.get(wanted["oid"], b"")) == wanted["size"]
                return as_json({}, 200 if stored else 404)
            case (_, "api", *rest):
                return self._api(request, rest)
        type_ = PLURAL.get(parts[0], "model")
        match parts[1:] if parts[0] in PLURAL else parts:
            case [namespace, name, "info", "lfs", "objects", "batch"]:
                return self._lfs_batch(request, type_, f"{namespace}/{name.removesuffix('.git')}")
            case [namespace, name, "resolve" | "raw", revision, *path]:
                return self._resolve(request, type_, f"{namespace}/{name}", revision, "/".join(path))
        raise RefusedError(404, "Not found")

    def _api(self, request: Request, parts: list[str]) -> Answer:
        match (request.method, *parts):
            case ("GET", "whoami-v2"):
                user = self._user(request)
                if user is None:
                    raise RefusedError(401, "Invalid username or password.")
                orgs = [{"name": org, "type": "org"} for org, members in self.orgs.items() if user in members]
                auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
                return as_json(
                    {"type": "user", "id": user, "name": user, "fullname": user, "isPro": False, "orgs": orgs,
                     "auth": auth}
                )  # fmt: skip
            case ("POST", "validate-yaml"):
                found = validate_yaml(request.json()["content"])
                return as_json(found, 400 if found["errors"] else 200)
            case ("POST", "repos", "create"):
                return self._create(request, request.json())
            case ("DELETE", "repos", "delete"):
                wanted = request.json()
                id_ = f"{wanted.get('organization') or self._user(request)}/{wanted['name']}"
                repo = self._repo(request, wanted.get("type") or "model", id_, write=True)
                del self.repos[repo.type, repo.id]
                return as_json({})
            case (_, kind, namespace, name, *rest) if kind in PLURAL:
                return self._repo_api(request, PLURAL[kind], f"{namespace}/{name}", rest)
        raise RefusedError(404, f"no such endpoint: {request.method} {request.path}")

    def _create(self, request: Request, wanted: dict[str, Any]) -> Answer:
        user = self._user(request)
        if user is None:
            raise RefusedError(401, "Invalid username or password.")
        type_, namespace = wanted.get("type") or "model", wanted.get("organization") or user
        id_ = f"{namespace}/{wanted['name']}"
        url = f"{self.url}/{PREFIX[type_]}{id_}"
        if not self._may_write(user, namespace):
            raise RefusedError(
                403, f'You don\'t have the rights to create a {type_} under the namespace "{namespace}"'
            )
        if (type_, id_) in self.repos:  # with exist_ok the client still reads the url
            raise RefusedError(409, f"You already created this {type_} repo", body={"url": url})
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.repos[type_, id_] = Repo(type_, id_, user, private, wanted.get("sdk"))
        return as_json({"url": url, "name": id_, "id": id_})

    def _repo_api(self, request: Request, type_: str, id_: str, parts: list[str]) -> Answer:
        create_pr = request.query.get("create_pr") == "1"
        to_pr = create_pr or (len(parts) > 1 and parts[1].startswith("refs/pr/"))
        match (request.method, *parts):
            case ("GET",) | ("GET", "revision", _):
                repo = self._repo(request, type_, id_)
                return as_json(
                    repo.info(repo.resolve(parts[1] if parts else "main")[1], blobs="blobs" in request.query)
                )
            case ("PUT", "settings"):
                repo, wanted = self._repo(request, type_, id_, write=True), request.json()
                if "visibility" in wanted or "private" in wanted:
                    repo.private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
                repo.gated = bool(wanted.get("gated", repo.gated))
                return as_json(wanted)
            case ("GET", "tree", revision, *path):
                repo = self._repo(request, type_, id_, content=True)
                recursive = request.query.get("recursive", "").lower() == "true"
                return as_json(repo.tree_json(repo.resolve(revision)[1], "/".join(path), recursive=recursive))
            case ("POST", "paths-info", revision):  # form-encoded, unlike everything else
                tree = self._repo(request, type_, id_, content=True).resolve(revision)[1].tree
                paths = parse_qs(request.body.decode()).get("paths", [])
                return as_json([tree[path].to_json(path) for path in paths if path in tree])
            case ("GET", "refs"):
                return as_json(self._repo(request, type_, id_).refs_json(with_prs="include_prs" in request.query))
            case ("GET", "commits", revision):
                commits = self._repo(request, type_, id_).history(revision)
                return as_json(
                    [{"id": c.oid, "title": c.title, "message": "", "date": c.date, "authors": [{"user": c.author}]}
                     for c in commits]
                )  # fmt: skip
            case ("POST", "branch" | "tag" as kind, name):
                return self._new_ref(self._repo(request, type_, id_, write=True), kind, name, request.json())
            case ("POST", "preupload", revision):
                _, commit = self._repo(request, type_, id_, write=not to_pr).resolve(revision)
                return as_json({"files": [commit.upload_mode(file) for file in request.json()["files"]]})
            case ("POST", "commit", revision):
                repo = self._repo(request, type_, id_, write=not to_pr)
                lines = [json.loads(line) for line in request.body.splitlines() if line.strip()]
                return self._commit(repo, self._user(request), revision, lines, create_pr=create_pr)
            case ("POST", "discussions"):
                repo, wanted = self._repo(request, type_, id_), request.json()
                is_pr = wanted.get("pullRequest", False)
                return as_json({"num": repo.open_discussion(wanted["title"], self._user(request), is_pr=is_pr)["num"]})
            case ("GET", "discussions"):
                repo = self._repo(request, type_, id_)
                return as_json({"discussions": repo.discussions, "count": len(repo.discussions), "start": 0})
            case ("GET", "discussions", number):
                return as_json(self._repo(request, type_, id_).discussion(number))
            case ("GET", "xet-read-token" | "xet-write-token" as kind, *_):
                self._repo(request, type_, id_, write=kind == "xet-write-token" and not to_pr)
                expires, cas = int(time.time()) + 3600, f"local://{self.blobs.xet_folder(type_, id_)}"
                headers = {
                    "X-Xet-Cas-Url": cas, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(expires)
                }  # fmt: skip
                return as_json({"accessToken": "xet", "exp": expires, "casUrl": cas}, headers=headers)
        raise RefusedError(404, f"no such endpoint: {request.method} {request.path}")

    def _new_ref(self, repo: Repo, kind: str, name: str, wanted: dict[str, Any]) -> Answer:
        ref = f"refs/heads/{name}" if kind == "branch" else f"refs/tags/{wanted['tag']}"
        if ref in repo.refs:
            raise RefusedError(409, f"Reference already exists: {ref}")
        start = wanted.get("startingPoint", "main") if kind == "branch" else name
        repo.refs[ref] = repo.resolve(start)[1].oid
        return as_json({})

    def _commit(self, repo: Repo, user: str | None, revision: str, lines: list[dict], *, create_pr: bool) -> Answer:
        header = lines[0]["value"]
        ref, base = repo.resolve(revision)
        if ref is None or ref.startswith("refs/tags/"):
            raise RefusedError(404, f"Cannot commit to {revision}: not a branch", "RevisionNotFound")
        if header.get("parentCommit") not in (None, base.oid):
            raise RefusedError(412, "A commit has happened since. Please refresh and try again.")
        tree = repo.apply(base, lines[1:], self.blobs)
        pr = repo.open_discussion(header["summary"], user, is_pr=True) if create_pr else None
        made = repo.commit(f"refs/pr/{pr['num']}" if pr else ref, tree, header["summary"], user or "?", base.oid)
        url = f"{self.url}/{PREFIX[repo.type]}{repo.id}"
        answer = {"success": True, "commitOid": made.oid, "commitUrl": f"{url}/commit/{made.oid}", "hookOutput": ""}
        return as_json(answer | ({"pullRequestUrl": f"{url}/discussions/{pr['num']}"} if pr else {}))

    def _lfs_batch(self, request: Request, type_: str, id_: str) -> Answer:
        self._repo(request, type_, id_)
        objects = []
        for wanted in request.json()["objects"]:
            oid = wanted["oid"]
            described = {"oid": oid, "size": wanted["size"]}
            if oid not in self.blobs.lfs:  # without actions the client takes it for stored
                described["actions"] = {
                    "upload": {"href": f"{self.cdn}/_lfs/{oid}"}, "verify": {"href": f"{self.url}/_lfs/{oid}/verify"}
                }  # fmt: skip
            objects.append(described)
        return as_json({"transfer": "basic", "objects": objects})

    def _resolve(self, request: Request, type_: str, id_: str, revision: str, path: str) -> Answer:
        repo = self._repo(request, type_, id_, content=True)
        commit = repo.resolve(revision)[1]
        headers = {"X-Repo-Commit": commit.oid}  # on the 404 as well: the client remembers what is not there
        entry = commit.tree.get(path)
        if entry is None:
            refused = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return as_json({"error": "Entry not found"}, 404, headers | refused)
        if entry.sha256 is None:
            return _serve(request, entry.data or b"", headers | {"ETag": f'"{entry.oid}"'})
        headers |= {
            "X-Linked-Size": str(entry.size), "X-Linked-Etag": f'"{entry.sha256}"',
            "Location": f"{self.cdn}/_cdn/{entry.sha256}",
        }  # fmt: skip
        if entry.xet_hash:
            token = f"{self.url}/api/{type_}s/{id_}/xet-read-token/{commit.oid}"
            headers |= {
                "X-Xet-Hash": entry.xet_hash, "X-Xet-Refresh-Route": token, "Link": f'<{token}>; rel="xet-auth"'
            }  # fmt: skip
        return Answer(302, b"", headers)


def _serve(request: Request, data: bytes, headers: dict[str, str]) -> Answer:
    headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **headers}
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range") or "")
    if not wanted:
        return Answer(200, data, headers)
    first, last = int(wanted[1]), min(int(wanted[2] or len(data) - 1), len(data) - 1)
    if first >= len(data):
        raise RefusedError(416, "Requested range not satisfiable")
    return Answer(206, data[first : last + 1], headers | {"Content-Range": f"bytes {first}-{last}/{len(data)}"})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def _do(self) -> None:
        hub: LocalHub = self.server.hub  # type: ignore[attr-defined]
        url = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        request = Request(self.command, url.path, query, self.headers, b"")
        if url.path not in UNCOUNTED:
            hub.authorizations.append((url.path, self.headers.get("Authorization")))
        fault = hub.fault_of(request)
        cut = fault.cut if fault else None
        if cut == "before":
            hub.requests.append(f"{self.command} {url.path} cut before")
            return self._hang_up()
        request.body = self._read_body()
        answer = hub.answer(request, fault)
        if url.path not in UNCOUNTED:
            hub.requests.append(f"{self.command} {url.path} {f'cut {cut}' if cut else answer.status}")
        if cut == "after":
            return self._hang_up()
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))  # of the whole file, for HEAD too
        self.end_headers()
        body = b"" if self.command == "HEAD" else answer.body
        self.wfile.write(body[: len(body) // 2] if cut == "middle" else body)
        if cut == "middle":
            self._hang_up()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _do

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _hang_up(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_) -> None:
        pass


if __name__ == "__main__":
    with LocalHub(users={"you": "hf_you", "other": "hf_other"}, orgs={"acme": ["you"]}) as served:
        print(f"export HF_ENDPOINT={served.url} HF_TOKEN=hf_you HF_HOME=$(mktemp -d)", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            sys.exit(0)
