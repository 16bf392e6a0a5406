"""The kernel folder in the layout that Hugging Face `kernels` loads, one copy per backend."""

import base64
import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .cards import render
from .errors import SLAConfigError
from .hub import Pushed, push_files

BACKENDS = ("cuda", "rocm", "xpu", "cpu")
NAME = "sla-attention"
_SOURCE = Path(__file__).parent / "kernel"
_OPS = '''"""Namespace of this copy's custom ops: several versions of the kernel may be loaded at once."""


def add_op_namespace_prefix(name):
    return "{namespace}::" + name
'''


def export_kernel(
    out: str | os.PathLike,
    *,
    repo_id: str = f"ORG/{NAME}",
    kernel_version: int = 1,
    backends: Sequence[str] = BACKENDS,
) -> list[Path]:
    """Write `build/torch-<backend>` for each backend and a README.md into `out`; returns the builds.

    The code of every backend is the same: what a machine cannot run it does not import.

    Args:
        repo_id: Where it will be, for the README.
        kernel_version: A new one for each incompatible change; 0 for trials.

    Raises:
        SLAConfigError: An unknown backend, or a version below 0.
    """
    unknown = [backend for backend in backends if backend not in BACKENDS]
    if unknown or not backends:
        raise SLAConfigError(f"backends must be some of {', '.join(BACKENDS)}, got {', '.join(unknown) or 'none'}")
    if kernel_version < 0:
        raise SLAConfigError(f"the kernel's version must be 0 or more, got {kernel_version}")
    out = Path(out)
    builds = []
    for backend in backends:
        build = out / "build" / f"torch-{backend}"
        if build.exists():
            shutil.rmtree(build)
        build.mkdir(parents=True)
        _write_build(build, backend, kernel_version)
        builds.append(build)
    (out / "README.md").write_text(_readme(repo_id, kernel_version, backends), encoding="utf-8")
    return builds


def push_kernel(
    out: str | os.PathLike, repo_id: str, *, kernel_version: int = 1, token: str | bool | None = None
) -> Pushed:
    """Push an export as a kernel repository: version N is the branch vN, and main has the README.md.

    Raises:
        SLAHubError: The Hub refuses, or cannot be reached. Kernel repositories are for organizations it has approved.
    """
    out = Path(out)
    files = {path.relative_to(out).as_posix(): path for path in sorted(out.rglob("*")) if path.is_file()}
    message = f"Add version {kernel_version} of the kernel"
    common: dict[str, Any] = {"message": message, "repo_type": "kernel", "token": token}
    push_files(repo_id, lambda _: {"README.md": out / "README.md"}, **common)
    return push_files(repo_id, lambda _: files, revision=f"v{kernel_version}", **common)


def _write_build(build: Path, backend: str, kernel_version: int) -> None:
    sources = {path.name: path.read_bytes() for path in sorted(_SOURCE.glob("*.py"))}
    content = hashlib.sha256(b"\0".join(name.encode() + b"\0" + text for name, text in sources.items()))
    identity = f"_{NAME.replace('-', '_')}_{backend}_{content.hexdigest()[:10]}"
    sources["_ops.py"] = _OPS.format(namespace=identity).encode()
    for name, text in sources.items():
        (build / name).write_bytes(text)
    digests = {
        name: base64.b64encode(hashlib.sha256(text).digest()).decode() for name, text in sorted(sources.items())
    }
    metadata = {
        "id": identity,
        "name": NAME,
        "version": kernel_version,
        "license": "apache-2.0",
        "python-depends": [],
        "kernel-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": digests},
    }
    (build / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


def _readme(repo_id: str, kernel_version: int, backends: Sequence[str]) -> str:
    try:
        package_version = version("diffusers-sla")
    except PackageNotFoundError:
        package_version = ""
    return render(
        "kernel.md", name=repo_id.rpartition("/")[2], repo_id=repo_id, version=kernel_version, backends=backends,
        license="apache-2.0", package_version=package_version,
    ) + "\n"  # fmt: skip
