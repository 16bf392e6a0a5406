"""The file `sla_attention.pt`: trained projections and the settings they were trained with. No network here.

Version 2: {"format": "diffusers_sla", "version": 2, "settings": {}, "state": {layer: {name: tensor}}, "meta": {}},
with layers such as "transformer.blocks.0.attn1". `sla_attention.safetensors` holds the same: tensors named
"<layer>.<name>", and the rest as JSON in its header. Version 1 is SimpleTuner's, one projection per head size.
"""

import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import SLAStateError, SLAStateFormatError, SLAStateNotFoundError, SLAStateVersionError

FORMAT = "diffusers_sla"
VERSION = 2
PT_NAME = "sla_attention.pt"
SAFETENSORS_NAME = "sla_attention.safetensors"
# Name in the file -> number of dimensions, each of the head size.
TENSORS = {"proj_l.weight": 2, "proj_l.bias": 1, "proj_s.weight": 2, "phi_q.weight": 2, "phi_k.weight": 2}
_FOREIGN = re.compile(
    r"(?:net\.)?blocks\.(\d+)\."
    r"(?:self_attn\.attn_op\.local_attn|attn1\.attn_op\.local_attn|attn1\.attn_impl)\.(proj_l\.(?:weight|bias))"
)


@dataclass
class SLAState:
    """What a state file holds.

    settings: SLAConfig's fields, or None in a foreign checkpoint. layers: tensors by layer, float32 on CPU.
    by_head_dim: instead of layers in a version 1 file: tensors by head size, shared by all layers of that size.
    """

    settings: dict[str, Any] | None
    layers: dict[str, dict[str, Tensor]]
    meta: dict[str, Any] = field(default_factory=dict)
    by_head_dim: dict[int, dict[str, Tensor]] = field(default_factory=dict)


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
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise SLAStateFormatError(f"{path} is damaged, or holds more than plain tensors: {_short(error)}") from error
    return _parse(payload, str(path))


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
        SLAStateError: Version 1 cannot hold this state.
    """
    path = Path(path)
    if version not in (1, VERSION):
        raise SLAStateError(f"version must be 1 or {VERSION}, got {version!r}")
    if path.suffix not in (".pt", ".safetensors"):
        raise SLAStateError(f"a state file ends in .pt or .safetensors, got {path.name!r}")
    if version == 1:
        if path.suffix != ".pt":
            raise SLAStateError("version 1 exists as a .pt file only")
        _replace(path, lambda file: torch.save(_version_1(state), file))
    elif path.suffix == ".pt":
        payload = {
            "format": FORMAT, "version": VERSION, "settings": state.settings, "state": state.layers, "meta": state.meta
        }  # fmt: skip
        _replace(path, lambda file: torch.save(payload, file))
    else:
        header = {"format": FORMAT, "version": str(VERSION)}
        header |= {"settings": json.dumps(state.settings), "meta": json.dumps(state.meta)}
        tensors = {
            f"{layer}.{name}": tensor.contiguous().clone()
            for layer, named in state.layers.items()
            for name, tensor in named.items()
        }
        _replace(path, lambda file: save_file(tensors, file, metadata=header))


def _replace(path: Path, write) -> None:
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
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if "format" not in header:
            return _parse(tensors, str(path))
        payload = {
            "format": header["format"], "version": int(header.get("version", "")),
            "settings": json.loads(header.get("settings", "")), "meta": json.loads(header.get("meta", "{}")),
        }  # fmt: skip
    except SLAStateError:
        raise
    except Exception as error:
        raise SLAStateFormatError(f"{path} is damaged: {_short(error)}") from error
    state: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        layer, name = _split(key)
        state.setdefault(layer, {})[name] = tensor
    return _parse(payload | {"state": state}, str(path))


def _split(key: str) -> tuple[str, str]:
    layer, dot, last = key.rpartition(".")
    layer, _, first = layer.rpartition(".")
    return layer, f"{first}{dot}{last}"


def _parse(payload: Any, where: str) -> SLAState:
    if not isinstance(payload, Mapping):
        raise SLAStateFormatError(f"{where} is not an SLA state: it holds a {type(payload).__name__}, not a dict")
    version = payload.get("version")
    if payload.get("format") == FORMAT:
        if not isinstance(version, int) or isinstance(version, bool) or version < 2:
            raise SLAStateFormatError(f"{where} has the impossible version {version!r}")
        if version > VERSION:
            raise SLAStateVersionError(
                f"{where} has version {version}, this package reads up to {VERSION}: update diffusers_sla"
            )
        settings, meta = (_plain_dict(payload.get(name, {}), name, where) for name in ("settings", "meta"))
        state = _plain_dict(payload.get("state"), "state", where)
        return SLAState(settings, {name: _layer(named, name, where) for name, named in state.items()}, meta)
    if version == 1 and "state" in payload and "format" not in payload:
        by_head_dim = {}
        for key, named in _plain_dict(payload["state"], "state", where).items():
            head_dim, colon, dtype = key.partition(":")
            if not head_dim.isdecimal() or not colon or dtype not in ("bf16", "fp16", "fp32"):
                raise SLAStateFormatError(f"{where}: {key!r} is not a version 1 key such as '128:bf16'")
            by_head_dim[int(head_dim)] = _layer(named, key, where)
            if _head_dim(by_head_dim[int(head_dim)]) != int(head_dim):
                raise SLAStateFormatError(f"{where}: the tensors of {key!r} are of another head size")
        return SLAState(_plain_dict(payload.get("settings", {}), "settings", where), {}, {"version": 1}, by_head_dim)
    layers: dict[str, dict[str, Any]] = {}
    for key, tensor in payload.items():
        match = _FOREIGN.fullmatch(key) if isinstance(key, str) else None
        if match:
            layers.setdefault(f"transformer.blocks.{match[1]}.attn1", {})[match[2]] = tensor
    if not layers:
        raise SLAStateFormatError(f"{where} is not an SLA state: neither this package's, nor one that it knows")
    return SLAState(None, {name: _layer(named, name, where) for name, named in layers.items()})


def _plain_dict(value: Any, name: str, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise SLAStateFormatError(f"{where}: {name!r} is not a dict with text keys")
    return dict(value)


def _layer(named: Any, layer: str, where: str) -> dict[str, Tensor]:
    tensors = {}
    for name, tensor in _plain_dict(named, layer, where).items():
        if name not in TENSORS:
            raise SLAStateFormatError(
                f"{where}: {layer} has an unknown tensor {name!r}; known are {', '.join(TENSORS)}"
            )
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise SLAStateFormatError(f"{where}: {layer}.{name} is not a tensor of floating point numbers")
        if tensor.dim() != TENSORS[name] or len(set(tensor.shape)) != 1 or tensor.numel() == 0:
            raise SLAStateFormatError(f"{where}: {layer}.{name} has the impossible shape {tuple(tensor.shape)}")
        tensors[name] = tensor.detach().to(device="cpu", dtype=torch.float32).contiguous()
        if not tensors[name].isfinite().all():
            raise SLAStateFormatError(f"{where}: {layer}.{name} holds NaN or infinity")
    if len({tensor.shape[0] for tensor in tensors.values()}) > 1:
        raise SLAStateFormatError(f"{where}: the tensors of {layer} are of several head sizes")
    return tensors


def _head_dim(named: Mapping[str, Tensor]) -> int:
    return next((tensor.shape[0] for tensor in named.values()), 0)


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
