"""The file `sla_attention.pt`: trained projections and the settings they were trained with. No network here.

Version 2: {"format": "diffusers_sla", "version": 2, "settings": {}, "state": {layer: {name: tensor}}, "meta": {},
"digest": text}, with layers such as "transformer.blocks.0.attn1". `sla_attention.safetensors` holds the same: tensors
named "<layer>.<name>", and the rest as JSON under "diffusers_sla" in its header. Version 1 is SimpleTuner's, with one
projection per head size. Other projects' keys are in foreign.py. docs/state-file.md describes all of it.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .errors import SLAStateError, SLAStateFormatError, SLAStateNotFoundError, SLAStateVersionError
from .foreign import foreign_layers
from .kernel.api import MAX_HEAD_DIM
from .tensor_files import check_plain, load_pt, open_safetensors, parse_json, shown

FORMAT = "diffusers_sla"
VERSION = 2
PT_NAME = "sla_attention.pt"
SAFETENSORS_NAME = "sla_attention.safetensors"
# Name in the file -> number of dimensions, each of the head size.
TENSORS = {"proj_l.weight": 2, "proj_l.bias": 1, "proj_s.weight": 2, "phi_q.weight": 2, "phi_k.weight": 2}
# A few hundred layers of 16,384 numbers are usual; nobody's file can make its reader allocate more than 1 GiB.
MAX_NUMBERS = 1 << 28


@dataclass
class SLAState:
    """What a state file holds.

    settings: SLAConfig's fields, or None in a foreign checkpoint. layers: tensors by layer, float32 on CPU.
    meta: what else is known, plain values; docs/state-file.md names the keys that model cards show.
    by_head_dim: instead of layers in a version 1 file: tensors by head size, shared by all layers of that size.
    """

    settings: dict[str, Any] | None
    layers: dict[str, dict[str, Tensor]]
    meta: dict[str, Any] = field(default_factory=dict)
    by_head_dim: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def digest(self) -> str:
        """SHA-256 of settings, names, shapes and float32 values: equal for files that mean the same."""
        found = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode())
        named = {
            f"{layer}.{name}": tensor for layer, tensors in self.layers.items() for name, tensor in tensors.items()
        }
        for key, tensor in sorted(named.items()):
            found.update(f"\n{key} {tuple(tensor.shape)}\n".encode())
            found.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
        return f"sha256:{found.hexdigest()}"


def read_state(source: str | os.PathLike | Mapping[str, Any]) -> SLAState:
    """Read a state file, a folder that has one, or the dict that a .pt file holds. Never unpickles code.

    Raises:
        SLAStateNotFoundError: There is no such file; says how to make one.
        SLAStateFormatError: Truncated, damaged, not an SLA state, or with tensors that cannot be.
        SLAStateVersionError: Written by a newer version of the format.
    """
    if isinstance(source, Mapping):
        return _parse(source, "the dict")
    path = find_state(source)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    return _parse(load_pt(path), str(path))


def find_state(source: str | os.PathLike) -> Path:
    """The state file that `source` is or has in it; of the two in a folder the .safetensors one."""
    path = Path(source)
    if path.is_dir():
        for name in (SAFETENSORS_NAME, PT_NAME):
            if (path / name).is_file():
                return path / name
        raise SLAStateNotFoundError(
            f"{path} has no {PT_NAME}; save_sla_weights(pipe, {str(path)!r}) writes one, "
            "from a pipeline that apply_sla was called on"
        )
    if not path.is_file():
        raise SLAStateNotFoundError(f"there is no state file {path}; save_sla_weights(pipe, folder) writes one")
    return path


def write_state(state: SLAState, path: str | os.PathLike, *, version: int = VERSION) -> None:
    """Write a .pt or .safetensors file, whole or not at all.

    Args:
        version: 2, or 1 for SimpleTuner's (.pt only), which has one projection for all layers of a head size.

    Raises:
        SLAStateError: The file would not be readable again, or version 1 cannot hold this state.
    """
    path = Path(path)
    if version not in (1, VERSION):
        raise SLAStateError(f"version must be 1 or {VERSION}, got {version!r}")
    if path.suffix not in (".pt", ".safetensors"):
        raise SLAStateError(f"a state file ends in .pt or .safetensors, got {path.name!r}")
    if version == 1:
        if path.suffix != ".pt":
            raise SLAStateError("version 1 exists as a .pt file only")
        payload = _version_1(state)
        replace(path, lambda file: _save_pt(payload, file))
        return
    if state.by_head_dim:
        raise SLAStateError(
            "this state has one projection per head size, which only version 1 can hold; load it into its model and "
            "save that"
        )
    if state.settings is None:
        raise SLAStateError("this state has no settings: it comes from another project's checkpoint; give it some")
    payload = {
        "format": FORMAT, "version": VERSION, "settings": state.settings, "state": state.layers, "meta": state.meta,
        "digest": state.digest(),
    }  # fmt: skip
    _parse(payload, str(path))
    if path.suffix == ".pt":
        replace(path, lambda file: _save_pt(payload, file))
        return
    # One entry: safetensors writes several in an order that changes from process to process.
    header = {FORMAT: json.dumps({name: value for name, value in payload.items() if name != "state"})}
    tensors = {
        f"{layer}.{name}": tensor.contiguous().clone()  # safetensors refuses tensors that share memory
        for layer, named in state.layers.items()
        for name, tensor in named.items()
    }
    replace(path, lambda file: save_file(tensors, file, metadata=header))


def replace(path: Path, write: Callable[[str], object]) -> None:
    """Call write(temporary path beside `path`), then put it in `path`'s place."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def _save_pt(payload: dict[str, Any], path: str) -> None:
    with open(path, "wb") as file:  # given a path, torch.save writes the temporary name into the file
        torch.save(payload, file)


def _version_1(state: SLAState) -> dict[str, Any]:
    by_head_dim: dict[int, dict[str, Tensor]] = dict(state.by_head_dim)
    for layer, named in state.layers.items():
        if "proj_s.weight" in named:
            raise SLAStateError(f"version 1 has no place for proj_s, which {layer} has")
        shared = by_head_dim.setdefault(_head_dim(named), named)
        if named.keys() != shared.keys() or any(not torch.equal(named[name], shared[name]) for name in named):
            raise SLAStateError(f"version 1 holds one projection for all layers of a head size; {layer} has its own")
    settings = {
        name: value
        for name, value in (state.settings or {}).items()
        if name in ("topk", "feature_map", "blkq", "blkk", "tie_feature_map_qk")
    }
    return {"settings": settings, "state": {f"{d}:bf16": t for d, t in sorted(by_head_dim.items())}, "version": 1}


def _read_safetensors(path: Path) -> SLAState:
    where = str(path)
    with open_safetensors(path) as (header, tensors):
        if FORMAT not in header:
            return _parse(tensors, where)
        payload = _dict(parse_json(header[FORMAT], "header", where), "header", where)
        state: dict[str, dict[str, Tensor]] = {}
        if payload.get("version") == VERSION:
            for key in tensors:
                layer, _, last = key.rpartition(".")
                layer, _, first = layer.rpartition(".")
                state.setdefault(layer, {})[f"{first}.{last}"] = tensors[key]
        return _parse(payload | {"format": FORMAT, "state": state}, where)


def _parse(payload: Any, where: str) -> SLAState:
    if not isinstance(payload, Mapping):
        raise SLAStateFormatError(f"{where} is not an SLA state: it holds a {type(payload).__name__}, not a dict")
    version = payload.get("version")
    if payload.get("format") == FORMAT:
        return _parse_version_2(payload, version, where)
    if version == 1 and not isinstance(version, bool) and "state" in payload and "format" not in payload:
        return _parse_version_1(payload, where)
    layers = foreign_layers(payload)
    if not layers:
        raise SLAStateFormatError(f"{where} is not an SLA state: neither this package's, nor one that it knows")
    return SLAState(None, _layers(layers, where))


def _parse_version_2(payload: Mapping[str, Any], version: Any, where: str) -> SLAState:
    if not isinstance(version, int) or isinstance(version, bool) or version < 2:
        raise SLAStateFormatError(f"{where} has the impossible version {shown(version)}")
    if version > VERSION:
        raise SLAStateVersionError(
            f"{where} has version {shown(version)}, this package reads up to {VERSION}: update diffusers_sla"
        )
    unknown = payload.keys() - {"format", "version", "settings", "state", "meta", "digest"}
    if unknown:
        raise SLAStateFormatError(f"{where} has the unknown entry {shown(min(map(str, unknown)))}")
    settings, meta = (_plain_dict(payload.get(name, {}), name, where) for name in ("settings", "meta"))
    state = SLAState(settings, _layers(_dict(payload.get("state"), "state", where), where), meta)
    if "digest" in payload and payload["digest"] != state.digest():
        raise SLAStateFormatError(f"{where} is damaged: its contents are not what was saved (the digest differs)")
    return state


def _parse_version_1(payload: Mapping[str, Any], where: str) -> SLAState:
    keys = {}
    for key in _dict(payload["state"], "state", where):
        head_dim, colon, dtype = key.partition(":")
        if not (head_dim.isascii() and head_dim.isdecimal()) or not colon or dtype not in ("bf16", "fp16", "fp32"):
            raise SLAStateFormatError(f"{where}: {shown(key)} is not a version 1 key such as '128:bf16'")
        keys[key] = int(head_dim)
    by_head_dim = {}
    for key, named in _layers(payload["state"], where).items():
        if _head_dim(named) != keys[key]:
            raise SLAStateFormatError(f"{where}: the tensors of {shown(key)} are of another head size")
        by_head_dim[keys[key]] = named
    return SLAState(_plain_dict(payload.get("settings", {}), "settings", where), {}, {"version": 1}, by_head_dim)


def _dict(value: Any, name: str, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise SLAStateFormatError(f"{where}: {shown(name)} is not a dict with text keys")
    return dict(value)


def _plain_dict(value: Any, name: str, where: str) -> dict[str, Any]:
    check_plain(value, name, where)
    return _dict(value, name, where)


def _layers(state: Mapping[str, Any], where: str) -> dict[str, dict[str, Tensor]]:
    """The tensors, checked before the first of them is copied: a few bytes in a file can claim any shape."""
    layers = {layer: _dict(named, layer, where) for layer, named in state.items()}
    numbers = 0
    for layer, named in layers.items():
        where_in = f"{where}: {shown(layer)}"
        for name, tensor in named.items():
            if name not in TENSORS:
                raise SLAStateFormatError(
                    f"{where_in} has an unknown tensor {shown(name)}; known are {', '.join(TENSORS)}"
                )
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.is_sparse:
                raise SLAStateFormatError(f"{where_in}: {name} is not a tensor of floating point numbers")
            shape = tuple(tensor.shape)
            if len(shape) != TENSORS[name] or len(set(shape)) != 1 or not 0 < shape[0] <= MAX_HEAD_DIM:
                raise SLAStateFormatError(f"{where_in}: {name} has the impossible shape {shape}")
            numbers += tensor.numel()
        if len({tensor.shape[0] for tensor in named.values()}) > 1:
            raise SLAStateFormatError(f"{where_in}: the tensors are of several head sizes")
    if numbers > MAX_NUMBERS:
        raise SLAStateFormatError(f"{where} holds {numbers} numbers, more than any model has projections")
    return {
        layer: {name: _copied(t, f"{where}: {shown(layer)}: {name}") for name, t in ts.items()}
        for layer, ts in layers.items()
    }


def _copied(tensor: Tensor, where: str) -> Tensor:
    copied = tensor.detach().to(device="cpu", dtype=torch.float32, copy=True).contiguous()
    if not copied.isfinite().all():
        raise SLAStateFormatError(f"{where} holds NaN or infinity")
    return copied


def _head_dim(named: Mapping[str, Tensor]) -> int:
    return next((tensor.shape[0] for tensor in named.values()), 0)
