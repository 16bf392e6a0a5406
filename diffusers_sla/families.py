"""What cannot be read off a model's code: which layers are self-attention, and where the text tokens sit."""

import re
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Family:
    """layers: pattern of the paths of self-attention layers. text: where the text tokens sit in their sequence.
    joined: pattern of those layers whose block joins text and image itself, so that the processor cannot see where
    the text ends. skips_cross: the pattern also meets cross-attention, told apart by `is_cross_attention`."""

    layers: str
    text: Literal["first", "last"] | None = None
    joined: str | None = None
    skips_cross: bool = False


_SELF = Family(r"(^|\.)attn1$")

FAMILIES: dict[str, Family] = {
    "AllegroTransformer3DModel": _SELF,
    "CogVideoXTransformer3DModel": Family(r"(^|\.)attn1$", text="first"),
    "DiTTransformer2DModel": _SELF,
    "FluxTransformer2DModel": Family(r"\.attn$", text="first", joined=r"^single_transformer_blocks\."),
    "HunyuanDiT2DModel": _SELF,
    "LTXVideoTransformer3DModel": _SELF,
    "PixArtTransformer2DModel": _SELF,
    "QwenImageTransformer2DModel": Family(r"\.attn$", text="first"),
    "SD3Transformer2DModel": Family(r"\.attn2?$", text="last"),
    "SkyReelsV2Transformer3DModel": _SELF,
    "UNet2DConditionModel": Family(r"\.attn1$", skips_cross=True),
    "WanTransformer3DModel": _SELF,
    "WanVACETransformer3DModel": _SELF,
}


def is_known(model) -> bool:
    """Whether there is a family for this model."""
    return any(base.__name__ in FAMILIES for base in type(model).__mro__)


def family_of(model) -> Family:
    """The family of a known model, also of the subclass that FSDP2 makes of a model's class."""
    return next(FAMILIES[base.__name__] for base in type(model).__mro__ if base.__name__ in FAMILIES)


def is_self_attention(family: Family, path: str, attn) -> bool:
    """Whether the layer at `path` is one that the family runs with SLA."""
    if not re.search(family.layers, path):
        return False
    return not (family.skips_cross and getattr(attn, "is_cross_attention", False))
