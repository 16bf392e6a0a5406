"""Tiny image transformers whose text and image tokens attend to each other."""

import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    BriaFibo2Transformer2DModel,
    BriaFiboTransformer2DModel,
    BriaTransformer2DModel,
    ChromaTransformer2DModel,
    CogView3PlusTransformer2DModel,
    CogView4Transformer2DModel,
    ErnieImageTransformer2DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    GlmImageTransformer2DModel,
    HiDreamImageTransformer2DModel,
    HunyuanImageTransformer2DModel,
    Ideogram4Transformer2DModel,
    JoyImageEditPlusTransformer3DModel,
    JoyImageEditTransformer3DModel,
    Krea2Transformer2DModel,
    LongCatImageTransformer2DModel,
    Lumina2Transformer2DModel,
    OvisImageTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    ZImageTransformer2DModel,
)
from diffusers.models.transformers.transformer_flux3 import Flux3Transformer2DModel
from diffusers.models.transformers.transformer_ideogram4 import LLM_TOKEN_INDICATOR, OUTPUT_IMAGE_INDICATOR


def _grid(axes=3):
    """Positions of 8 x 8 image tokens."""
    ids = torch.zeros(64, axes)
    ids[:, -2], ids[:, -1] = torch.arange(64) // 8, torch.arange(64) % 8
    return ids


def _text_mask(batch=2, length=7):
    """The last sample's text is three tokens shorter."""
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[-1, -3:] = False
    return mask


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


def flux2():
    model = Flux2Transformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, timestep_guidance_channels=32, axes_dims_rope=[4, 4, 4, 4],
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 64, 4), "encoder_hidden_states": torch.randn(1, 9, 32),
        "timestep": torch.tensor([1.0]), "guidance": torch.tensor([1.0]), "img_ids": _grid(4)[None],
        "txt_ids": torch.zeros(1, 9, 4),
    }  # fmt: skip


def flux3():
    model = Flux3Transformer2DModel(
        in_channels=4, cond_in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, timestep_channels=32, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 64, 4), "encoder_hidden_states": torch.randn(1, 9, 32),
        "timestep": torch.tensor([1.0]), "img_ids": _grid(4), "txt_ids": torch.zeros(9, 4),
        "image_cond_hidden_states": torch.randn(1, 32, 4), "image_cond_ids": _grid(4)[:32],
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


def qwen():
    model = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 64, 16), "encoder_hidden_states": torch.randn(2, 7, 16),
        "encoder_hidden_states_mask": _text_mask().long(), "timestep": torch.tensor([1.0, 1.0]),
        "img_shapes": [(1, 8, 8)] * 2,
    }  # fmt: skip


def chroma():
    model = ChromaTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=[4, 4, 8], approximator_num_channels=8, approximator_hidden_dim=16,
        approximator_layers=1,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 64, 4), "encoder_hidden_states": torch.randn(2, 7, 32),
        "timestep": torch.tensor([1.0, 1.0]), "img_ids": _grid(), "txt_ids": torch.zeros(7, 3),
        "attention_mask": torch.cat([_text_mask(), torch.ones(2, 64, dtype=torch.bool)], 1),
    }  # fmt: skip


def auraflow():
    model = AuraFlowTransformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1,
        attention_head_dim=8, num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16,
        pos_embed_max_size=64,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 4, 16, 16), "encoder_hidden_states": torch.randn(1, 7, 16),
        "timestep": torch.tensor([1.0]),
    }  # fmt: skip


def bria():
    model = BriaTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=[0, 4, 4],
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 64, 4), "encoder_hidden_states": torch.randn(1, 9, 32),
        "timestep": torch.tensor([1.0]), "img_ids": _grid(), "txt_ids": torch.zeros(9, 3),
    }  # fmt: skip


def bria_fibo():
    model = BriaFiboTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=64, text_encoder_dim=32, axes_dims_rope=[0, 4, 4],
    )  # fmt: skip
    mask = torch.cat([_text_mask(2, 9), torch.ones(2, 64, dtype=torch.bool)], 1)
    return model, {
        "hidden_states": torch.randn(2, 64, 16), "encoder_hidden_states": torch.randn(2, 9, 64),
        "text_encoder_layers": [torch.randn(2, 9, 32) for _ in range(2)], "timestep": torch.tensor([1.0, 1.0]),
        "img_ids": _grid(), "txt_ids": torch.zeros(9, 3),
        "joint_attention_kwargs": {"attention_mask": mask[:, None, :, None] & mask[:, None, None]},
    }  # fmt: skip


def bria_fibo2():
    model = BriaFibo2Transformer2DModel(
        in_channels=4, patch_size=2, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, cap_feat_dim=24,
        injection_layer_ids=(1,), perceiver_num_layers=1, min_num_gist_tokens=4, max_num_gist_tokens=8, gist_step=4,
        gist_min_text_len=4, gist_max_text_len=16, axes_dims=(4, 6, 6), axes_lens=(16, 16, 16),
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 4, 16, 16), "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": torch.randn(1, 2, 4, 24),
    }  # fmt: skip


def cogview3():
    model = CogView3PlusTransformer2DModel(
        patch_size=2, in_channels=4, num_layers=1, attention_head_dim=4, num_attention_heads=2, out_channels=4,
        text_embed_dim=8, time_embed_dim=8, condition_dim=2, pos_embed_max_size=8, sample_size=16,
    )  # fmt: skip
    size = torch.tensor([[16, 16]])
    return model, {
        "hidden_states": torch.randn(1, 4, 16, 16), "encoder_hidden_states": torch.randn(1, 7, 8),
        "original_size": size, "target_size": size, "crop_coords": size, "timestep": torch.tensor([1.0]),
    }  # fmt: skip


def cogview4():
    model = CogView4Transformer2DModel(
        patch_size=2, in_channels=4, num_layers=2, attention_head_dim=4, num_attention_heads=4, out_channels=4,
        text_embed_dim=8, time_embed_dim=8, condition_dim=4,
    )  # fmt: skip
    size = torch.tensor([[16.0, 16.0]] * 2)
    return model, {
        "hidden_states": torch.randn(2, 4, 16, 16), "encoder_hidden_states": torch.randn(2, 7, 8),
        "original_size": size, "target_size": size, "crop_coords": size, "timestep": torch.tensor([1.0, 1.0]),
    }  # fmt: skip


def ernie():
    model = ErnieImageTransformer2DModel(
        hidden_size=16, num_attention_heads=1, num_layers=2, ffn_hidden_size=16, in_channels=16, out_channels=16,
        text_in_dim=16, rope_axes_dim=(8, 4, 4),
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 16, 8, 8), "timestep": torch.tensor([1.0, 1.0]),
        "text_bth": torch.randn(2, 7, 16), "text_lens": torch.tensor([7, 4]),
    }  # fmt: skip


def glm():
    model = GlmImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        text_embed_dim=32, time_embed_dim=16, condition_dim=8, prior_vq_quantizer_codebook_size=64,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 4, 16, 16), "encoder_hidden_states": torch.randn(2, 7, 32),
        "prior_token_id": torch.randint(0, 64, (2, 64)), "prior_token_drop": torch.zeros(2, 64, dtype=torch.bool),
        "timestep": torch.tensor([3, 3]), "target_size": torch.tensor([[16.0, 16.0]] * 2),
        "crop_coords": torch.zeros(2, 2),
    }  # fmt: skip


def hidream():
    model = HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=4, caption_channels=[8, 4], text_emb_dim=8, num_routed_experts=2,
        num_activated_experts=2, axes_dims_rope=(4, 2, 2), max_resolution=(32, 32), llama_layers=(0, 1),
        force_inference_output=True,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 4, 16, 16), "encoder_hidden_states_t5": torch.randn(1, 3, 8),
        "encoder_hidden_states_llama3": torch.randn(2, 1, 5, 4), "pooled_embeds": torch.randn(1, 8),
        "timesteps": torch.tensor([3]),
    }  # fmt: skip


def hunyuan_image():
    model = HunyuanImageTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=(1, 1), guidance_embeds=False, text_embed_dim=32, rope_axes_dim=(4, 4),
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([1.0, 1.0]),
        "encoder_hidden_states": torch.randn(2, 7, 32), "encoder_attention_mask": _text_mask(),
    }  # fmt: skip


def ideogram4():
    model = Ideogram4Transformer2DModel(
        in_channels=16, num_layers=2, attention_head_dim=8, num_attention_heads=4, intermediate_size=32, adaln_dim=16,
        llm_features_dim=24, rope_theta=10_000, mrope_section=(2, 1, 1),
    )  # fmt: skip
    positions = torch.arange(71)[None, :, None].expand(2, 71, 3)
    indicator = torch.full((2, 71), OUTPUT_IMAGE_INDICATOR)
    indicator[:, :7] = LLM_TOKEN_INDICATOR
    return model, {
        "hidden_states": torch.randn(2, 71, 16), "encoder_hidden_states": torch.randn(2, 71, 24),
        "timestep": torch.tensor([0.5, 0.5]), "position_ids": positions, "segment_ids": torch.ones(2, 71),
        "indicator": indicator,
    }  # fmt: skip


def joyimage():
    model = JoyImageEditTransformer3DModel(
        patch_size=[1, 2, 2], in_channels=16, hidden_size=32, num_attention_heads=2, text_dim=16, num_layers=2,
        rope_dim_list=[4, 6, 6], theta=256,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 1, 16, 1, 16, 16), "timestep": torch.tensor([1.0]),
        "encoder_hidden_states": torch.randn(1, 7, 16),
    }  # fmt: skip


def joyimage_plus():
    model = JoyImageEditPlusTransformer3DModel(
        patch_size=[1, 2, 2], in_channels=16, hidden_size=32, num_attention_heads=2, text_dim=16, num_layers=2,
        rope_dim_list=[4, 6, 6], theta=256,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 64, 16, 1, 2, 2), "timestep": torch.tensor([1.0, 1.0]),
        "encoder_hidden_states": torch.randn(2, 7, 16), "encoder_hidden_states_mask": _text_mask().float(),
        "shape_list": [[(1, 8, 4), (1, 8, 4)], [(1, 8, 4), (1, 7, 4)]],
    }  # fmt: skip


def krea2():
    model = Krea2Transformer2DModel(
        in_channels=16, num_layers=2, attention_head_dim=8, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=32, timestep_embed_dim=16, text_hidden_dim=16, num_text_layers=2, text_num_attention_heads=2,
        text_num_key_value_heads=2, text_intermediate_size=32, num_layerwise_text_blocks=1, num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 64, 16), "encoder_hidden_states": torch.randn(2, 7, 2, 16),
        "timestep": torch.tensor([1.0, 1.0]), "position_ids": torch.cat([torch.zeros(7, 3), _grid()]),
        "encoder_attention_mask": _text_mask(),
    }  # fmt: skip


def longcat_image():
    model = LongCatImageTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 64, 4), "encoder_hidden_states": torch.randn(1, 9, 32),
        "timestep": torch.tensor([1.0]), "img_ids": _grid(), "txt_ids": torch.zeros(9, 3),
    }  # fmt: skip


def lumina2():
    model = Lumina2Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, hidden_size=24, num_layers=2, num_refiner_layers=1,
        num_attention_heads=3, num_kv_heads=1, multiple_of=2, scaling_factor=1.0, axes_dim_rope=(4, 2, 2),
        axes_lens=(128, 128, 128), cap_feat_dim=32,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 4, 16, 16), "encoder_hidden_states": torch.randn(2, 7, 32),
        "timestep": torch.rand(2), "encoder_attention_mask": _text_mask(),
    }  # fmt: skip


def ovis():
    model = OvisImageTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 64, 4), "encoder_hidden_states": torch.randn(1, 9, 32),
        "timestep": torch.tensor([1.0]), "img_ids": _grid(), "txt_ids": torch.zeros(9, 3),
    }  # fmt: skip


def z_image():
    model = ZImageTransformer2DModel(
        in_channels=16, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    )  # fmt: skip
    return model, {
        "x": [torch.randn(16, 1, 16, 16) for _ in range(2)], "t": torch.tensor([0.5, 0.5]),
        "cap_feats": [torch.randn(16, 16), torch.randn(40, 16)],
    }  # fmt: skip


# Name -> maker, SLA layers[, text tokens per layer[, SLA calls per layer]].
MODELS = {
    "flux": (flux, 2, 9), "flux2": (flux2, 2, 9), "flux3": (flux3, 3, 9), "sd3": (sd3, 3, 7), "qwen": (qwen, 2, 7),
    "chroma": (chroma, 2, 7), "auraflow": (auraflow, 2, 15), "bria": (bria, 2, 9), "bria_fibo": (bria_fibo, 2, 9),
    "bria_fibo2": (bria_fibo2, 3, 4), "cogview3": (cogview3, 1, 7), "cogview4": (cogview4, 2, 7),
    "ernie": (ernie, 2, 7), "glm": (glm, 1, 7), "hidream": (hidream, 2, 13), "hunyuan_image": (hunyuan_image, 2, 7),
    "ideogram4": (ideogram4, 2, 7), "joyimage": (joyimage, 2, 7), "joyimage_plus": (joyimage_plus, 2, 7),
    "krea2": (krea2, 2, 7), "longcat_image": (longcat_image, 2, 9), "lumina2": (lumina2, 3, 7), "ovis": (ovis, 2, 9),
    "z_image": (z_image, 2, 64),
}  # fmt: skip
