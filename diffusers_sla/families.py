"""What cannot be read off a model's code: which of its layers are self-attention, and where its text tokens sit.

One row per model class. To add one: find its attention layers' paths with `model.named_modules()`, read its block for
the order in which text and image are joined and for the masks it makes, add the row here and a tiny model in
tests/models, and run `python docs/models.py`.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Inputs = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Args:
        layers: Pattern of the paths of the layers that run SLA.
        unless: Name of an attribute of the attention module; a layer where it is set does not run SLA.
        text: Where the text tokens sit in the sequence, "first" or "last"; None where there are none.
        text_if_masked: The same for calls that come with a mask, where it differs.
        image_tokens: For models where the processor does not get the text by itself: (model, forward's arguments by
            name) -> image tokens in the sequence. All others of it are text then.
        extra_keys: Queries are image tokens only, and the text is among the keys only.
        causal: The layer also makes a causal call, of the text to itself. It stays as it is.
        mask: What masks besides boolean ones that hide keys, [B, 1, 1, L], the model makes. "product": [B, 1, L, L],
            the outer product of such a one, boolean or as ones and zeros. "bias": numbers added to the scores, zero
            for keys that are there, in either shape.
        packed: Context parallelism cuts the joined sequence, not text and image each.
        note: For docs/models.md.
    """

    layers: str
    unless: str | None = None
    text: Literal["first", "last"] | None = None
    text_if_masked: Literal["first", "last"] | None = None
    image_tokens: Callable[[Any, Inputs], int] | None = None
    extra_keys: bool = False
    causal: bool = False
    mask: Literal["product", "bias"] | None = None
    packed: bool = False
    note: str = ""


def _sequence(model: Any, inputs: Inputs) -> int:
    """Latents come as a sequence [B, tokens, C]."""
    return inputs["hidden_states"].shape[1]


def _patches(model: Any, inputs: Inputs) -> int:
    """Latents [B, C, (F,) H, W] are cut into patches of p x p."""
    *frames, height, width = inputs["hidden_states"].shape[2:]
    p = model.config.patch_size
    return math.prod(frames) * (height // p) * (width // p)


def _flux3(model: Any, inputs: Inputs) -> int:
    condition = inputs.get("image_cond_hidden_states")
    return _sequence(model, inputs) + (0 if condition is None else condition.shape[1])


def _hidream(model: Any, inputs: Inputs) -> int:
    latents = inputs["hidden_states"]
    if latents.ndim == 3:
        return latents.shape[1]
    return _patches(model, inputs) if latents.shape[2] == latents.shape[3] else model.max_seq


def _minimax_h3(model: Any, inputs: Inputs) -> int:
    return _sequence(model, inputs) + inputs["audio_hidden_states"].shape[1]


def _bria_fibo2(model: Any, inputs: Inputs) -> int:
    p = model.config.patch_size
    context = inputs.get("context_latents") or []
    return _patches(model, inputs) + sum((x.shape[-2] // p) * (x.shape[-1] // p) for x in context)


def _ideogram4(model: Any, inputs: Inputs) -> int:
    from diffusers.models.transformers.transformer_ideogram4 import OUTPUT_IMAGE_INDICATOR

    # Only a tensor knows: one wait for the device per forward of the model.
    return int((inputs["indicator"][0] == OUTPUT_IMAGE_INDICATOR).sum())


def _z_image(model: Any, inputs: Inputs) -> int:
    if inputs.get("siglip_feats") is not None or inputs.get("image_noise_mask") is not None:
        return 0  # text first then, among several images: everything is kept
    p, f = inputs.get("patch_size", 2), inputs.get("f_patch_size", 1)
    sizes = [(x.shape[1] // f) * (x.shape[2] // p) * (x.shape[3] // p) for x in inputs["x"]]
    return min(size + -size % 32 for size in sizes)  # in a batch, text starts behind the smallest image


_UNET = Family(r"\.attn[12]$", unless="is_cross_attention", note="spatial and temporal self-attention")
_ATTN1 = Family(r"(^|\.)attn1$")
_FLUX = Family(r"^(single_)?transformer_blocks\.\d+\.attn$", text="first", image_tokens=_sequence)
_HUNYUAN = Family(r"^(single_)?transformer_blocks\.\d+\.attn$", text="last")

_CONTROLNET = "ControlNets run natively, so that a state file fits a pipeline with and without one"

# fmt: off
FAMILIES: dict[str, Family] = {
    # UNets
    "AudioLDM2UNet2DConditionModel": _UNET,
    "DreamLiteUNetModel": Family(r"\.attn1$"),
    "I2VGenXLUNet": _UNET,
    "Kandinsky3UNet": Family(r"attentions\.0\.attention$", note="`is_cross_attention` is set on all of its layers"),
    "StableCascadeUNet": Family(r"^(down|up)_blocks\..*\.attention$", text="last", extra_keys=True),
    "UNet2DConditionModel": _UNET,
    "UNet2DModel": Family(r"\.attentions\.\d+$"),
    "UNet3DConditionModel": _UNET,
    "UNetControlNetXSModel": _UNET,
    "UNetMotionModel": _UNET,
    "UNetSpatioTemporalConditionModel": _UNET,
    "UVit2DModel": Family(r"^transformer_layers\.\d+\.attn1$"),
    # Image transformers without text in their self-attention
    "DiTTransformer2DModel": _ATTN1,
    "DreamLiteTransformer2DModel": _ATTN1,
    "HunyuanDiT2DModel": _ATTN1,
    "LuminaNextDiT2DModel": _ATTN1,
    "PixArtTransformer2DModel": _ATTN1,
    "Transformer2DModel": Family(r"\.attn[12]$", unless="is_cross_attention"),
    # Image transformers, text among the keys only
    "NucleusMoEImageTransformer2DModel": Family(r"\.attn$", text="last", extra_keys=True),
    "PRXTransformer2DModel": Family(r"^blocks\.\d+\.attention$", text="first", extra_keys=True),
    # Image transformers with joint attention
    "AuraFlowTransformer2DModel": Family(
        r"_transformer_blocks\.\d+\.attn$", text="first", image_tokens=_patches, note="registers are kept, too"),
    "BriaFibo2Transformer2DModel": Family(
        r"^(noise_refiner|layers)\.\d+\.attention$", text="first", text_if_masked="last", image_tokens=_bria_fibo2,
        note="the gist tokens are the text"),
    "BriaFiboTransformer2DModel": Family(
        r"^(single_)?transformer_blocks\.\d+\.attn$", text="first", image_tokens=_sequence, mask="bias"),
    "BriaTransformer2DModel": _FLUX,
    "ChromaTransformer2DModel": Family(
        r"^(single_)?transformer_blocks\.\d+\.attn$", text="first", image_tokens=_sequence, mask="product",
        note="the pipeline hands its mask over as ones and zeros, which native attention adds to the scores; "
        "here padded keys are masked"),
    "CogView3PlusTransformer2DModel": Family(r"\.attn1$", text="first"),
    "CogView4Transformer2DModel": Family(
        r"\.attn1$", text="first", mask="product", note="masks as in Chroma"),
    "ErnieImageTransformer2DModel": Family(r"\.self_attention$", text="last", image_tokens=_patches),
    "Flux2Transformer2DModel": Family(
        r"^(single_)?transformer_blocks\.\d+\.attn$", text="first", image_tokens=_sequence,
        note="with a KV cache the pipeline sets processors of its own, which run dense"),
    "Flux3Transformer2DModel": Family(
        r"^(mode_blocks\.\w+|single_transformer_blocks)\.\d+\.attn$", text="first", image_tokens=_flux3),
    "FluxTransformer2DModel": _FLUX,
    "GlmImageTransformer2DModel": Family(
        r"\.attn1$", text="first", mask="product", note="masks as in Chroma; calls that read its KV cache run dense"),
    "HiDreamImageTransformer2DModel": Family(r"\.attn1$", text="last", image_tokens=_hidream),
    "HunyuanImageTransformer2DModel": _HUNYUAN,
    "Ideogram4Transformer2DModel": Family(
        r"^layers\.\d+\.attention$", text="first", image_tokens=_ideogram4, mask="product",
        note="waits for the device once per forward, to count the text"),
    "JoyImageEditPlusTransformer3DModel": Family(r"^double_blocks\.\d+\.attn$", text="last"),
    "JoyImageEditTransformer3DModel": Family(r"^double_blocks\.\d+\.attn$", text="last"),
    "Krea2Transformer2DModel": Family(r"^transformer_blocks\.\d+\.attn$", text="first", image_tokens=_sequence),
    "LongCatImageTransformer2DModel": _FLUX,
    "Lumina2Transformer2DModel": Family(
        r"^(noise_refiner|layers)\.\d+\.attn$", text="first", image_tokens=_patches),
    "OvisImageTransformer2DModel": _FLUX,
    "QwenImageTransformer2DModel": Family(r"^transformer_blocks\.\d+\.attn$", text="first"),
    "SD3Transformer2DModel": Family(r"\.attn2?$", text="last", note="`attn2` is image-only self-attention"),
    "ZImageTransformer2DModel": Family(
        r"^(noise_refiner|layers)\.\d+\.attention$", text="last", image_tokens=_z_image,
        note="omni mode runs dense"),
    # Video transformers without text in their self-attention
    "AllegroTransformer3DModel": Family(r"\.attn1$", mask="bias"),
    "AnyFlowTransformer3DModel": _ATTN1,
    "ChronoEditTransformer3DModel": _ATTN1,
    "CosmosTransformer3DModel": _ATTN1,
    "HeliosTransformer3DModel": _ATTN1,
    "Kandinsky5Transformer3DModel": Family(
        r"^visual_transformer_blocks\.\d+\.self_attention$", note="NABLA calls (`sparse_params`) run as they are"),
    "Kandinsky6Transformer3DModel": Family(
        r"^visual_transformer_blocks\..*\.self_attention$", note="video and audio"),
    "LTX2VideoTransformer3DModel": Family(r"\.(audio_)?attn1$", note="video and audio"),
    "LTXVideoTransformer3DModel": _ATTN1,
    "LatteTransformer3DModel": Family(r"\.attn1$", note="spatial and temporal"),
    "SanaWMLTX2RefinerTransformer3DModel": _ATTN1,
    "SkyReelsV2Transformer3DModel": Family(r"\.attn1$", note="causal blocks run dense"),
    "WanAnimate2Transformer3DModel": Family(
        r"\.self_attn$", note="the reference pass; the pass over the cache is block-sparse already and runs as it is"),
    "WanAnimateTransformer3DModel": _ATTN1,
    "WanTransformer3DModel": _ATTN1,
    "WanVACETransformer3DModel": _ATTN1,
    # Video transformers with joint attention
    "CogVideoXTransformer3DModel": Family(r"\.attn1$", text="first"),
    "ConsisIDTransformer3DModel": Family(r"\.attn1$", text="first"),
    "Cosmos3OmniTransformer": Family(
        r"\.self_attn$", text="first", extra_keys=True, causal=True,
        note="the text attends to itself as it always did"),
    "EasyAnimateTransformer3DModel": Family(r"\.attn1$", text="first"),
    "HunyuanVideo15Transformer3DModel": Family(
        r"^transformer_blocks\.\d+\.attn$", text="last", mask="product"),
    "HunyuanVideoFramepackTransformer3DModel": _HUNYUAN,
    "HunyuanVideoTransformer3DModel": _HUNYUAN,
    "MiniMaxH3Transformer3DModel": Family(
        r"^transformer_blocks\.\d+\.attn$", text="first", image_tokens=_minimax_h3, packed=True),
    "MochiTransformer3DModel": Family(
        r"^transformer_blocks\.\d+\.attn1$", text="last", image_tokens=_patches, note="one call per sample"),
    "MotifVideoTransformer3DModel": Family(
        r"^(single_)?transformer_blocks\.\d+\.attn$", text="last",
        note="decoder blocks keep the encoder's tokens like text"),
    # Audio, music and other sequences
    "AceStepTransformer1DModel": Family(
        r"\.self_attn$", unless="sliding_window", note="its layers of full attention; the others see a window"),
    "LongCatAudioDiTTransformer": Family(r"\.self_attn$"),
    "MiniMaxMusic3Transformer1DModel": Family(r"\.attn$"),
    "StableAudio3DiTModel": Family(r"\.self_attn$", note="differential attention is two SLA calls"),
    "StableAudioDiTModel": _ATTN1,
    "TransformerTemporalModel": Family(r"\.attn[12]$", unless="is_cross_attention"),
}

REFUSED: dict[str, str] = {
    "AnyFlowFARTransformer3DModel": "its self-attention is block-causal (a FlexAttention mask)",
    "ControlNetModel": _CONTROLNET,
    "ControlNetUnionModel": _CONTROLNET,
    "ControlNetXSAdapter": "it is a part of UNetControlNetXSModel",
    "CosmosControlNetModel": _CONTROLNET,
    "FluxControlNetModel": _CONTROLNET,
    "HunyuanDiT2DControlNetModel": _CONTROLNET,
    "Kandinsky6SRTransformer3DModel": "its self-attention is sparse already (NABLA)",
    "MiniMaxMusic3RVQDepthDecoder": "its attention is causal, over a few tokens",
    "MotionAdapter": "it is a part of UNetMotionModel",
    "OmniGenTransformer2DModel": "its mask is causal for text and differs from query to query",
    "PriorTransformer": "its attention is causal, over a few tokens",
    "QwenImage21Transformer2DModel": "its self-attention is block-causal",
    "QwenImageControlNetModel": _CONTROLNET,
    "RFD4ProteinaTransformer": "its attention adds a bias for every pair of tokens",
    "SD3ControlNetModel": _CONTROLNET,
    "SanaControlNetModel": "its self-attention is linear already",
    "SanaTransformer2DModel": "its self-attention is linear already",
    "SanaVideoTransformer3DModel": "its self-attention is linear already",
    "SanaWMTransformer3DModel": "three of four layers are linear already, and its softmax layers have no processor",
    "SparseControlNetModel": _CONTROLNET,
    "T5FilmDecoder": "its attention leaves the scores unscaled and makes no attention call that could be taken over",
    "UNet1DModel": "its attention is written out in the model, without a processor",
    "UniDiffuserModel": "it is deprecated in Diffusers",
    "ZImageControlNetModel": _CONTROLNET,
}
# fmt: on


def is_known(model: Any) -> bool:
    """Whether there is a family for this model."""
    return any(base.__name__ in FAMILIES for base in type(model).__mro__)


def family_of(model: Any) -> Family:
    """The family of a known model, also of the subclass that FSDP2 makes of a model's class."""
    return next(FAMILIES[base.__name__] for base in type(model).__mro__ if base.__name__ in FAMILIES)


def is_self_attention(family: Family, path: str, attn: Any) -> bool:
    """Whether the layer at `path` is one that the family runs with SLA."""
    if not re.search(family.layers, path):
        return False
    return family.unless is None or not getattr(attn, family.unless, None)
