"""How other projects name the projections that this package keeps in its state files."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import SLAStateError, SLAStateFormatError


@dataclass(frozen=True)
class Layout:
    """key: the projection of block {block}, before ".weight" and ".bias". settings: what that project runs with, for
    its files hold none."""

    key: str
    settings: dict[str, Any]


# thu-ml/TurboDiffusion samples with query blocks of 128 and a top-k of 0.1; SGLang and FastVideo run its weights.
_TURBO = {"topk": 0.1, "blkq": 128, "blkk": 64, "feature_map": "softmax", "linear": "all"}
LAYOUTS = {
    "turbodiffusion": Layout("blocks.{block}.self_attn.attn_op.local_attn.proj_l", _TURBO),
    "sglang": Layout("blocks.{block}.attn1.attn_op.local_attn.proj_l", _TURBO),
    "fastvideo": Layout("blocks.{block}.attn1.attn_impl.proj_l", _TURBO),
}
_OURS = re.compile(r"transformer\.blocks\.(\d+)\.attn1")
_THEIRS = {
    name: re.compile(r"(?:net\.)?" + re.escape(layout.key).replace(r"\{block\}", r"(\d{1,6})") + r"\.(weight|bias)")
    for name, layout in LAYOUTS.items()
}


def flat(payload: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """The tensors of a checkpoint, which a trainer may have put under "state_dict"."""
    inner = payload.get("state_dict")
    return inner if isinstance(inner, Mapping) else payload


def layout_of(payload: Mapping[Any, Any]) -> str | None:
    """The project whose keys are among those of a checkpoint."""
    for name, pattern in _THEIRS.items():
        if any(isinstance(key, str) and pattern.fullmatch(key) for key in flat(payload)):
            return name
    return None


def is_projection(key: str) -> bool:
    """Whether a checkpoint's key is one of SLA's."""
    return any(pattern.fullmatch(key) for pattern in _THEIRS.values())


def foreign_layers(payload: Mapping[Any, Any]) -> dict[str, dict[str, Any]]:
    """A checkpoint's projections under our layer names; the model's own weights in it are passed over.

    Raises:
        SLAStateFormatError: Two keys are for the same projection.
    """
    layers: dict[str, dict[str, Any]] = {}
    payload = flat(payload)
    for key in payload:
        for pattern in _THEIRS.values():
            match = pattern.fullmatch(key) if isinstance(key, str) else None
            if match:
                named = layers.setdefault(f"transformer.blocks.{int(match[1])}.attn1", {})
                if f"proj_l.{match[2]}" in named:
                    raise SLAStateFormatError(f"the checkpoint has proj_l.{match[2]} of block {int(match[1])} twice")
                named[f"proj_l.{match[2]}"] = payload[key]
    return layers


def to_foreign(layers: Mapping[str, Mapping[str, Any]], layout: str) -> dict[str, Any]:
    """The projections under another project's keys.

    Raises:
        SLAStateError: That project has no place for one of them.
    """
    tensors = {}
    for layer, named in layers.items():
        match = _OURS.fullmatch(layer)
        if not match:
            raise SLAStateError(f"{layout} has keys for the blocks of Wan's transformer only, not for {layer}")
        for name, tensor in named.items():
            if not name.startswith("proj_l."):
                raise SLAStateError(f"{layout} has no place for {layer}.{name}")
            key = LAYOUTS[layout].key.format(block=match[1])
            tensors[f"{key}.{name.removeprefix('proj_l.')}"] = tensor
    return tensors
