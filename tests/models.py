"""Tiny random diffusers models and inputs for them, by name."""

import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    LTXVideoTransformer3DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
)


def unet():
    model = UNet2DConditionModel(
        block_out_channels=(8, 16), norm_num_groups=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=8, attention_head_dim=2,
        layers_per_block=1, sample_size=16,
    )  # fmt: skip
    return model, {
        "sample": torch.randn(2, 4, 16, 16), "timestep": torch.tensor([10]),
        "encoder_hidden_states": torch.randn(2, 7, 8),
    }  # fmt: skip


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


def flux():
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 64, 4), "encoder_hidden_states": torch.randn(1, 9, 32),
        "pooled_projections": torch.randn(1, 32), "timestep": torch.tensor([1.0]), "img_ids": torch.rand(64, 3),
        "txt_ids": torch.rand(9, 3),
    }  # fmt: skip


def wan():
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
        text_dim=16, freq_dim=256, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 4, 2, 16, 16), "timestep": torch.tensor([1]),
        "encoder_hidden_states": torch.randn(1, 12, 16),
    }  # fmt: skip


def sd3():
    model = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, caption_projection_dim=16, joint_attention_dim=32, pooled_projection_dim=16,
        pos_embed_max_size=16, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 4, 16, 16), "encoder_hidden_states": torch.randn(1, 7, 32),
        "pooled_projections": torch.randn(1, 16), "timestep": torch.tensor([1.0]),
    }  # fmt: skip


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


def ltx():
    model = LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, cross_attention_dim=24,
        num_layers=1, caption_channels=8,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 64, 4), "timestep": torch.tensor([1]),
        "encoder_hidden_states": torch.randn(1, 6, 8), "encoder_attention_mask": torch.ones(1, 6), "num_frames": 1,
        "height": 8, "width": 8,
    }  # fmt: skip


def cogvideox():
    model = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=2,
        text_embed_dim=8, num_layers=1, sample_width=8, sample_height=8, sample_frames=9, patch_size=2,
        temporal_compression_ratio=4, max_text_seq_length=8,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 3, 4, 8, 8), "timestep": torch.tensor([1]),
        "encoder_hidden_states": torch.randn(1, 8, 8),
    }  # fmt: skip


def qwen():
    model = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 64, 16), "encoder_hidden_states": torch.randn(1, 7, 16),
        "encoder_hidden_states_mask": torch.ones(1, 7, dtype=torch.long), "timestep": torch.tensor([1.0]),
        "img_shapes": [(1, 8, 8)],
    }  # fmt: skip


# Name -> maker, SLA layers, text tokens per layer.
MODELS = {
    "unet": (unet, 4, 0), "dit": (dit, 2, 0), "flux": (flux, 2, 9), "wan": (wan, 2, 0), "sd3": (sd3, 3, 7),
    "pixart": (pixart, 1, 0), "ltx": (ltx, 1, 0), "cogvideox": (cogvideox, 1, 8), "qwen": (qwen, 2, 7),
}  # fmt: skip


def make(name):
    """Model in eval mode and its inputs, the same every time."""
    torch.manual_seed(0)
    model, inputs = MODELS[name][0]()
    for parameter in model.parameters():  # some models start with layers at zero, behind which nothing shows
        if not parameter.detach().any():
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval(), inputs


def output(model, inputs):
    return model(**inputs, return_dict=False)[0]
