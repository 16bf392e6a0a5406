"""What is in a state file, here or on the Hub, for people to look at."""

import hashlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .errors import SLAStateError, SLAStateFormatError
from .foreign import flat, foreign_layers, layout_of
from .hub import Remote, download, is_repo_id, remote_files, remote_header
from .state import FORMAT, PT_NAME, SAFETENSORS_NAME, SLAState, find_state, read_state
from .tensor_files import load_pt, open_safetensors, parse_json, pickle_globals
from .weights import parse_settings


@dataclass
class Inspection:
    """tensors: by layer and name its dtype as stored, its shape and, where the values were read, its norm.

    problem: why the file cannot be loaded, or None.
    """

    source: str
    layout: str
    settings: dict[str, Any] | None
    meta: dict[str, Any]
    tensors: dict[str, dict[str, dict[str, Any]]]
    digest: str | None = None
    sha256: str | None = None
    size: int | None = None
    pickle_globals: list[str] | None = None
    problem: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return vars(self)

    def __str__(self) -> str:
        numbers = sum(math.prod(t["shape"]) for named in self.tensors.values() for t in named.values())
        heads = sorted({t["shape"][0] for named in self.tensors.values() for t in named.values() if t["shape"]})
        lines = [
            ("file", self.source),
            ("layout", self.layout),
            ("base model", self.meta.get("base_model", "not recorded")),
            ("settings", _settings(self.settings)),
            ("layers", f"{len(self.tensors)}, head size {' and '.join(map(str, heads))}, {numbers:,} numbers"),
            ("digest", self.digest),
            ("sha256", self.sha256),
            ("size", f"{self.size:,} bytes" if self.size is not None else None),
            ("imports", None if self.pickle_globals is None else ", ".join(self.pickle_globals) or "nothing"),
            ("recorded", ", ".join(name for name in self.meta if name != "base_model")),
            ("PROBLEM", self.problem),
        ]
        text = [f"{name:<11} {_printable(value)}" for name, value in lines if value]
        rows = [("layer", "tensor", "dtype", "shape", "norm")]
        for layer, named in self.tensors.items():
            for name, tensor in named.items():
                norm = f"{tensor['norm']:.4g}" if "norm" in tensor else "not read"
                shape = "x".join(map(str, tensor["shape"]))
                rows.append((_printable(layer), _printable(name), _printable(tensor["dtype"]), shape, norm))
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        return "\n".join([*text, "", *("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)])


def inspect_state(
    source: str | os.PathLike, remote: Remote | None = None, weight_name: str | None = None
) -> Inspection:
    """Look into a file, a folder or a repository. Of a .safetensors file on the Hub only the header is fetched.

    A file that cannot be loaded is described as far as it goes, with the reason as `problem`.

    Raises:
        SLAStateNotFoundError, SLAHubError: There is no such file.
        SLAStateFormatError: Nothing of it can be made out.
    """
    if isinstance(source, str) and is_repo_id(source):
        remote = remote or Remote("")
        remote.repo_id = source
        names = [weight_name] if weight_name else [SAFETENSORS_NAME, PT_NAME]
        name = next((name for name in names if name in remote_files(remote)), names[-1])
        if name.endswith(".safetensors"):
            return _remote(remote, name)
        path = download(remote, name)
    else:
        path = find_state(source)
    return _local(path)


def _printable(value: Any) -> str:
    """Text of a stranger's file as one line that does nothing to a terminal."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in str(value))


def _settings(settings: dict[str, Any] | None) -> str:
    if settings is None:
        return "none in the file"
    return ", ".join(f"{name}={value}" for name, value in settings.items() if value not in (None, [])) or "defaults"


def _remote(remote: Remote, name: str) -> Inspection:
    header, tensors = remote_header(remote, name)
    where = f"{remote.repo_id}/{remote.subfolder + '/' if remote.subfolder else ''}{name}"
    described = {key: {"dtype": dtype, "shape": shape} for key, (dtype, shape) in tensors.items()}
    found = _described(header, described, where)
    try:
        if found.settings is not None:
            parse_settings(SLAState(found.settings, {}))
    except SLAStateError as error:
        found.problem = str(error)
    return found


def _local(path: Path) -> Inspection:
    where = str(path)
    if path.suffix == ".safetensors":
        with open_safetensors(path) as (header, tensors):
            found = _described(header, tensors, where)
    else:
        found = _described_pt(load_pt(path), where)
        found.pickle_globals = sorted(name.replace(" ", ".") for name in pickle_globals(path))
    found.size = path.stat().st_size
    with path.open("rb") as file:
        found.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    try:
        state = read_state(path)
        if state.settings is not None:
            parse_settings(state)
        found.digest = found.digest or state.digest()
    except SLAStateError as error:
        found.problem = str(error)
    return found


def _described(header: Mapping[str, str], tensors: Mapping[str, Any], where: str) -> Inspection:
    if FORMAT not in header:
        return _described_pt(tensors, where)
    content = parse_json(header[FORMAT], "header", where)
    if not isinstance(content, dict):
        raise SLAStateFormatError(f"{where}: the header is not a dict")
    layers: dict[str, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        layer, _, last = key.rpartition(".")
        layer, _, first = layer.rpartition(".")
        layers.setdefault(layer, {})[f"{first}.{last}"] = tensor
    return _made(content, layers, where)


def _described_pt(payload: Any, where: str) -> Inspection:
    if not isinstance(payload, Mapping):
        raise SLAStateFormatError(f"{where} is not an SLA state: it holds a {type(payload).__name__}, not a dict")
    if payload.get("format") == FORMAT or (payload.get("version") == 1 and "state" in payload):
        state = payload.get("state")
        layers = {str(layer): named for layer, named in state.items()} if isinstance(state, Mapping) else {}
        return _made(payload, layers, where)
    layers = foreign_layers(payload)
    if not layers:
        raise SLAStateFormatError(f"{where} is not an SLA state: neither this package's, nor one that it knows")
    layout = layout_of(payload)
    others = len(flat(payload)) - sum(map(len, layers.values()))
    beside = f", beside {others} other tensors" if others else ""
    return Inspection(where, f"{layout}{beside}", None, {}, _tensors(layers))


def _made(content: Mapping[str, Any], layers: Mapping[str, Any], where: str) -> Inspection:
    settings, meta, digest = content.get("settings"), content.get("meta"), content.get("digest")
    version = content.get("version")
    simpletuner = version == 1 and "format" not in content
    layout = "SimpleTuner, version 1" if simpletuner else f"diffusers_sla, version {version}"
    return Inspection(
        where, layout, settings if isinstance(settings, dict) else None, meta if isinstance(meta, dict) else {},
        _tensors(layers), digest if isinstance(digest, str) else None,
    )  # fmt: skip


def _tensors(layers: Mapping[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    return {
        layer: {str(name): _tensor(tensor) for name, tensor in named.items()}
        for layer, named in layers.items()
        if isinstance(named, Mapping)
    }


def _tensor(tensor: Any) -> dict[str, Any]:
    if isinstance(tensor, dict):
        return tensor
    if not isinstance(tensor, torch.Tensor):
        return {"dtype": type(tensor).__name__, "shape": []}
    found: dict[str, Any] = {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
    if tensor.is_floating_point() and tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size():
        found["norm"] = tensor.double().norm().item()
    return found
