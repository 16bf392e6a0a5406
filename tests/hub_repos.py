"""What the local Hub of the tests stores: repositories with commits, branches, tags and pull requests, and big files.

Big files travel as on the real Hub: by git-lfs (a batch request, then a PUT), or by xet, where the real hf_xet client
works on a directory in place of a content-addressed server (`local://`).
"""

import base64
import hashlib
import json
import re
import struct
import tempfile
from collections import OrderedDict
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

LFS_SUFFIXES = (
    ".bin", ".ckpt", ".gz", ".h5", ".mp4", ".npz", ".onnx", ".pickle", ".pkl", ".png", ".pt", ".pth", ".safetensors",
    ".tar", ".zip",
)  # fmt: skip
LFS_THRESHOLD = 10 * 1024 * 1024
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()


class RefusedError(Exception):
    """An answer other than success. The client reads `code` (X-Error-Code) before it looks at the status."""

    def __init__(self, status: int, message: str, code: str | None = None, body: dict | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.body = status, message, code, body or {}


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


@dataclass(frozen=True)
class Entry:
    """A file in a commit: `data` in git itself, or the sha256 (and the xet hash) of a big one."""

    size: int
    data: bytes | None = None
    sha256: str | None = None
    xet_hash: str | None = None

    @property
    def pointer(self) -> bytes:
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()

    @property
    def oid(self) -> str:
        blob = self.pointer if self.sha256 else self.data or b""
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    def to_json(self, path: str) -> dict[str, Any]:
        found: dict[str, Any] = {"type": "file", "oid": self.oid, "size": self.size, "path": path}
        if self.sha256:
            found["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": len(self.pointer)}
        if self.xet_hash:
            found["xetHash"] = self.xet_hash
        return found


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    tree: dict[str, Entry]
    title: str
    author: str
    date: str

    def upload_mode(self, file: dict[str, Any]) -> dict[str, Any]:
        """How the client shall send a file of a next commit; the oid lets it drop what has not changed."""
        big = file["path"].endswith(LFS_SUFFIXES) or file["size"] > LFS_THRESHOLD
        old = self.tree.get(file["path"])
        mode = {"path": file["path"], "uploadMode": "lfs" if big else "regular", "shouldIgnore": False}
        return mode | ({"oid": old.sha256 or old.oid} if old else {})


@dataclass
class Repo:
    type: str
    id: str
    owner: str
    private: bool = False
    sdk: str | None = None
    gated: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=OrderedDict)
    discussions: list[dict[str, Any]] = field(default_factory=list)
    created: str = field(default_factory=now)

    def __post_init__(self):
        attributes = {".gitattributes": Entry(len(GITATTRIBUTES), GITATTRIBUTES)}
        self.commit("refs/heads/main", attributes, "initial commit", self.owner)

    def commit(self, ref: str, tree: dict[str, Entry], title: str, author: str, parent: str | None = None) -> Commit:
        parent = parent or self.refs.get(ref)
        what = [sorted((path, entry.oid) for path, entry in tree.items()), parent, title, author, len(self.commits)]
        made = Commit(hashlib.sha1(json.dumps(what).encode()).hexdigest(), parent, tree, title, author, now())
        self.commits[made.oid] = made
        self.refs[ref] = made.oid
        return made

    def resolve(self, revision: str) -> tuple[str | None, Commit]:
        """(ref or None, commit) that a branch, tag, full ref or commit id names."""
        for ref in (revision, f"refs/heads/{revision}", f"refs/tags/{revision}"):
            if ref in self.refs:
                return ref, self.commits[self.refs[ref]]
        if revision in self.commits:
            return None, self.commits[revision]
        raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def history(self, revision: str = "main") -> list[Commit]:
        """The commits of a revision, newest first."""
        found = [self.resolve(revision)[1]]
        while found[-1].parent:
            found.append(self.commits[found[-1].parent])
        return found

    def info(self, commit: Commit, *, blobs: bool = False) -> dict[str, Any]:
        siblings = []
        for path, entry in sorted(commit.tree.items()):
            sibling: dict[str, Any] = {"rfilename": path}
            if blobs:
                sibling |= {"size": entry.size, "blobId": entry.oid}
                if entry.sha256:
                    sibling["lfs"] = {
                        "sha256": entry.sha256, "size": entry.size, "pointerSize": len(entry.pointer)
                    }  # fmt: skip
            siblings.append(sibling)
        card = front_matter(commit.tree["README.md"].data or b"") if "README.md" in commit.tree else {}
        info = {
            "_id": "0" * 24, "id": self.id, "modelId": self.id, "author": self.id.split("/")[0], "sha": commit.oid,
            "private": self.private, "gated": "auto" if self.gated else False, "disabled": False, "downloads": 0,
            "likes": 0, "createdAt": self.created, "lastModified": commit.date, "tags": list(card.get("tags") or []),
            "library_name": card.get("library_name"), "pipeline_tag": card.get("pipeline_tag"), "cardData": card,
            "siblings": siblings, "spaces": [],
        }  # fmt: skip
        return info | ({"sdk": self.sdk} if self.sdk else {})

    def tree_json(self, commit: Commit, path: str, *, recursive: bool) -> list[dict[str, Any]]:
        base = path + "/" if path else ""
        found: list[dict[str, Any]] = []
        folders = set()
        for name, entry in sorted(commit.tree.items()):
            if not name.startswith(base):
                continue
            parts = name[len(base) :].split("/")
            for depth in range(1, len(parts) if recursive else min(2, len(parts))):
                folder = base + "/".join(parts[:depth])
                if folder not in folders:
                    folders.add(folder)
                    oid = hashlib.sha1(folder.encode()).hexdigest()
                    found.append({"type": "directory", "oid": oid, "size": 0, "path": folder})
            if recursive or len(parts) == 1:
                found.append(entry.to_json(name))
        if path and not found:
            raise RefusedError(404, f"{path} does not exist on this revision", "EntryNotFound")
        return found

    def refs_json(self, *, with_prs: bool) -> dict[str, Any]:
        def group(prefix: str) -> list[dict[str, str]]:
            return [
                {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": oid}
                for ref, oid in self.refs.items()
                if ref.startswith(prefix)
            ]

        refs = {"branches": group("refs/heads/"), "tags": group("refs/tags/"), "converts": []}
        return refs | ({"pullRequests": group("refs/pr/")} if with_prs else {})

    def apply(self, commit: Commit, lines: list[dict[str, Any]], blobs: "Blobs") -> dict[str, Entry]:
        """The tree that a commit's operations make of `commit`'s."""
        tree = dict(commit.tree)
        for line in lines:
            value = line["value"]
            path = value["path"]
            match line["key"]:
                case "file":
                    data = base64.b64decode(value["content"])
                    tree[path] = Entry(len(data), data)
                case "lfsFile":
                    tree[path] = blobs.entry(self, value["oid"])
                case "deletedFile":
                    if tree.pop(path, None) is None:
                        raise RefusedError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
                case "deletedFolder":
                    tree = {name: entry for name, entry in tree.items() if not name.startswith(path.rstrip("/") + "/")}
        return tree

    def open_discussion(self, title: str, author: str | None, *, is_pr: bool) -> dict[str, Any]:
        number = len(self.discussions) + 1
        discussion = {
            "num": number, "title": title, "status": "draft" if is_pr else "open", "isPullRequest": is_pr,
            "createdAt": now(), "author": {"name": author}, "repo": {"name": self.id, "type": self.type}, "events": [],
            "filesWithConflicts": [], "changes": {"base": "refs/heads/main"}, "diff": "",
        }  # fmt: skip
        self.discussions.append(discussion)
        if is_pr:
            self.refs[f"refs/pr/{number}"] = self.refs["refs/heads/main"]
        return discussion

    def discussion(self, number: str) -> dict[str, Any]:
        if not number.isdigit() or not 0 < int(number) <= len(self.discussions):
            raise RefusedError(404, "Discussion not found")
        return self.discussions[int(number) - 1]


def front_matter(readme: bytes) -> dict[str, Any]:
    match = re.match(rb"---\s*\n(.*?)\n---\s*(\n|$)", readme, re.DOTALL)
    return yaml.safe_load(match[1]) or {} if match else {}


def validate_yaml(content: str) -> dict[str, Any]:
    match = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", content, re.DOTALL)
    errors, warnings = [], [] if match else [{"message": "empty or missing yaml metadata in repo card"}]
    try:
        if match and not isinstance(yaml.safe_load(match[1]), dict):
            errors.append({"message": "yaml metadata must be a mapping"})
    except yaml.YAMLError as error:
        errors.append({"message": str(error).splitlines()[0]})
    return {"errors": errors, "warnings": warnings}


class Blobs:
    """Big files by sha256, uploaded through git-lfs or found in the xet directory of their repository."""

    def __init__(self):
        self.lfs: dict[str, bytes] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="local-hub-")
        self.folder = Path(self._folder.name)

    def close(self) -> None:
        self._folder.cleanup()

    def xet_folder(self, type_: str, id_: str) -> Path:
        # One per repository: its index is locked exclusively, so parallel clients of a shared one would fail.
        return self.folder / f"{type_}s--{id_.replace('/', '--')}"

    def entry(self, repo: Repo, sha256: str) -> Entry:
        xet_hash, size = _xet_index(self.xet_folder(repo.type, repo.id)).get(sha256, (None, None))
        size = len(self.lfs[sha256]) if sha256 in self.lfs else size
        if size is None:
            raise RefusedError(400, f"LFS pointer pointed to a file that does not exist: {sha256}")
        return Entry(size, sha256=sha256, xet_hash=xet_hash)

    def read(self, sha256: str) -> bytes:
        """The bytes, for a client that speaks plain HTTP."""
        if sha256 not in self.lfs:
            import hf_xet

            for folder in self.folder.iterdir():
                if found := _xet_index(folder).get(sha256):
                    target = self.folder / f"{sha256}.bin"
                    with hf_xet.XetSession().new_file_download_group(endpoint=f"local://{folder}") as group:
                        group.start_download_file(hf_xet.XetFileInfo(found[0], None), str(target))
                    self.lfs[sha256] = target.read_bytes()
                    target.unlink()
                    break
            else:
                raise RefusedError(404, "no such object")
        return self.lfs[sha256]


def _xet_index(folder: Path) -> dict[str, tuple[str, int]]:
    """sha256 -> (xet hash, size), from the shards of metadata that hf_xet wrote into `folder`.

    A shard is a 48-byte header, then per file: its hash and the number of segments, 48 bytes each, as many bytes of
    verification if flag 31 is set, and a record with the sha256 if flag 30 is set. A hash of all ones ends the list.
    """

    def text(raw: bytes) -> str:
        return "".join(f"{word:016x}" for word in struct.unpack("<4Q", raw))

    found = {}
    for shard in folder.glob("xet/xorbs/shards/*.mdb"):
        raw, at = shard.read_bytes(), 48
        while raw[at : at + 32] != b"\xff" * 32:
            name, (flags, count) = text(raw[at : at + 32]), struct.unpack_from("<II", raw, at + 32)
            size = sum(struct.unpack_from("<I", raw, at + 48 * (i + 1) + 36)[0] for i in range(count))
            at += 48 + 48 * count * (2 if flags >> 31 & 1 else 1)
            if flags >> 30 & 1:
                found[text(raw[at : at + 32])] = (name, size)
                at += 48
    return found
