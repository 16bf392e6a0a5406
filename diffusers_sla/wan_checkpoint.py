"""Wan checkpoints in the original layout, as TurboDiffusion releases them, into diffusers' layout."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from torch import Tensor

from .errors import SLAStateFormatError
from .foreign import flat, is_projection
from .tensor_files import load_pt, open_safetensors

PATCH = (1, 2, 2)


def is_wan_checkpoint(payload: Mapping[Any, Any]) -> bool:
    """Whether a checkpoint has Wan's own weights, not its projections alone."""
    return any(isinstance(key, str) and key.endswith("patch_embedding.weight") for key in flat(payload))


def convert_wan_checkpoint(source: str | os.PathLike, folder: str | os.PathLike) -> Path:
    """Write the transformer of a .pth or .safetensors checkpoint to `folder`, as diffusers loads it; returns it.

    The projections of SLA in it are left out: `read_state` reads them. Weights keep their dtype and are read from
    disk one by one.

    Raises:
        SLAStateFormatError: Not a Wan checkpoint, a quantized one, or with weights that diffusers has no place for.
    """
    source = Path(source)
    if source.suffix == ".safetensors":
        with open_safetensors(source) as (_, tensors):
            return _convert(tensors, str(source), Path(folder))
    payload = load_pt(source)
    if not isinstance(payload, Mapping):
        raise SLAStateFormatError(f"{source} holds a {type(payload).__name__}, not a dict of tensors")
    return _convert(flat(payload), str(source), Path(folder))


def _convert(payload: Mapping[Any, Any], where: str, folder: Path) -> Path:
    weights: dict[str, Tensor] = {}
    for key in payload:
        tensor = payload[key] if not is_projection(str(key)) else None
        if tensor is None or not isinstance(tensor, Tensor):
            continue
        name = str(key).removeprefix("net.")
        if not tensor.is_floating_point():
            raise SLAStateFormatError(f"{where} is quantized ({name} is {tensor.dtype}); convert the unquantized one")
        weights[name] = tensor
    if not is_wan_checkpoint(weights):
        raise SLAStateFormatError(f"{where} is not a checkpoint of Wan's transformer: it has no patch_embedding")
    head_dim = next((payload[key].shape[-1] for key in payload if is_projection(str(key))), 128)
    config = _config(weights, head_dim, where)
    embedding = weights["patch_embedding.weight"]  # a linear layer over flattened patches, or already a convolution
    weights["patch_embedding.weight"] = embedding.reshape(embedding.shape[0], config["in_channels"], *PATCH)
    with torch.device("meta"):
        model: Any = WanTransformer3DModel(**config)
    converted = convert_wan_transformer_to_diffusers(dict(weights))
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    shared = expected.keys() & converted.keys()
    for problem, names in (
        ("has no", expected.keys() - shared),
        ("has weights that diffusers has no place for:", converted.keys() - shared),
        ("has another shape for", {name for name in shared if expected[name] != converted[name].shape}),
    ):
        if names:
            raise SLAStateFormatError(f"{where} {problem} {min(names)} ({len(names)} in all)")
    model.load_state_dict(converted, assign=True)
    model.save_pretrained(folder)
    return folder


def _config(weights: Mapping[str, Tensor], head_dim: int, where: str) -> dict[str, Any]:
    """The model's sizes, read off the shapes of its weights."""

    def size(name: str, dimension: int) -> int:
        if name not in weights or weights[name].dim() <= dimension:
            raise SLAStateFormatError(f"{where} is not a checkpoint of Wan's transformer: it has no proper {name}")
        return weights[name].shape[dimension]

    dim = size("patch_embedding.weight", 0)
    blocks = {int(match[1]) for name in weights if (match := re.match(r"blocks\.(\d{1,4})\.", name))}
    patch = torch.Size(PATCH).numel()
    images = "img_emb.proj.1.weight" in weights
    return {
        "patch_size": PATCH,
        "num_attention_heads": dim // head_dim,
        "attention_head_dim": head_dim,
        "in_channels": weights["patch_embedding.weight"].numel() // dim // patch,
        "out_channels": size("head.head.weight", 0) // patch,
        "text_dim": size("text_embedding.0.weight", 1),
        "freq_dim": size("time_embedding.0.weight", 1),
        "ffn_dim": size("blocks.0.ffn.0.weight", 0),
        "num_layers": max(blocks) + 1,
        "cross_attn_norm": "blocks.0.norm3.weight" in weights,
        "qk_norm": "rms_norm_across_heads" if "blocks.0.self_attn.norm_q.weight" in weights else None,
        "eps": 1e-6,
        "image_dim": size("img_emb.proj.1.weight", 1) if images else None,
        "added_kv_proj_dim": dim if images else None,
    }
