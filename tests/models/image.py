"""Tiny image transformers whose self-attention sees image tokens only."""

import torch
from diffusers import (
    DiTTransformer2DModel,
    HunyuanDiT2DModel,
    LuminaNextDiT2DModel,
    NucleusMoEImageTransformer2DModel,
    PixArtTransformer2DModel,
    PRXTransformer2DModel,
    Transformer2DModel,
)


def dit():
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2, sample_size=16,
        patch_size=2, num_embeds_ada_norm=10, norm_type="ada_norm_zero",
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 4, 16, 16),
        "timestep": torch.tensor([3]),
        "class_labels": torch.tensor([1]),
    }


def pixart():
    model = PixArtTransformer2DModel(
        num_layers=1, num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, sample_size=16,
        patch_size=2, cross_attention_dim=16, caption_channels=8, norm_num_groups=1, use_additional_conditions=False,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 4, 16, 16), "timestep": torch.tensor([1]),
        "encoder_hidden_states": torch.randn(1, 6, 8),
        "added_cond_kwargs": {"aspect_ratio": None, "resolution": None},
    }  # fmt: skip


def hunyuan_dit():
    model = HunyuanDiT2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        hidden_size=16, cross_attention_dim=8, cross_attention_dim_t5=8, pooled_projection_dim=4, text_len=4,
        text_len_t5=4, use_style_cond_and_image_meta_size=False,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 4, 16, 16), "encoder_hidden_states": torch.randn(2, 4, 8),
        "text_embedding_mask": torch.ones(2, 4), "encoder_hidden_states_t5": torch.randn(2, 4, 8),
        "text_embedding_mask_t5": torch.ones(2, 4), "timestep": torch.tensor([3.0, 3.0]), "image_meta_size": None,
        "style": None, "image_rotary_emb": [torch.ones(64, 8), torch.zeros(64, 8)],
    }  # fmt: skip


def lumina_next():
    model = LuminaNextDiT2DModel(
        sample_size=16, patch_size=2, in_channels=4, hidden_size=24, num_layers=2, num_attention_heads=3,
        num_kv_heads=1, multiple_of=16, cross_attention_dim=32,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 4, 16, 16), "encoder_hidden_states": torch.randn(2, 7, 32),
        "encoder_mask": torch.ones(2, 7), "timestep": torch.rand(2),
        "image_rotary_emb": torch.polar(torch.ones(384, 384, 4), torch.rand(384, 384, 4)),
        "cross_attention_kwargs": {},
    }  # fmt: skip


def nucleus():
    model = NucleusMoEImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=4,
        num_key_value_heads=2, joint_attention_dim=16, axes_dims_rope=(8, 4, 4), moe_enabled=False,
        capacity_factors=[8.0, 8.0],
    )  # fmt: skip
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 4:] = False
    return model, {
        "hidden_states": torch.randn(2, 64, 16), "encoder_hidden_states": torch.randn(2, 7, 16),
        "encoder_hidden_states_mask": mask, "timestep": torch.tensor([1.0, 1.0]), "img_shapes": [(1, 8, 8)] * 2,
    }  # fmt: skip


def prx():
    model = PRXTransformer2DModel(
        in_channels=4, patch_size=2, context_in_dim=16, hidden_size=16, mlp_ratio=2.0, num_heads=2, depth=2,
        axes_dim=[4, 4],
    )  # fmt: skip
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 4:] = False
    return model, {
        "hidden_states": torch.randn(2, 4, 16, 16), "timestep": torch.tensor([1.0, 1.0]),
        "encoder_hidden_states": torch.randn(2, 7, 16), "attention_mask": mask,
    }  # fmt: skip


def transformer_2d():
    model = Transformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=16, norm_num_groups=4, cross_attention_dim=8,
        num_layers=1,
    )  # fmt: skip
    return model, {"hidden_states": torch.randn(1, 16, 8, 8), "encoder_hidden_states": torch.randn(1, 5, 8)}


# Name -> maker, SLA layers[, text tokens per layer[, SLA calls per layer]].
MODELS = {
    "dit": (dit, 2), "pixart": (pixart, 1), "hunyuan_dit": (hunyuan_dit, 2), "lumina_next": (lumina_next, 2),
    "nucleus": (nucleus, 2, 7), "prx": (prx, 2, 7), "transformer_2d": (transformer_2d, 1),
}  # fmt: skip
