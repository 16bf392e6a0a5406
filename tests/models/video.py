"""Tiny video transformers."""

import torch
from diffusers import (
    AllegroTransformer3DModel,
    AnyFlowFARTransformer3DModel,
    AnyFlowTransformer3DModel,
    ChronoEditTransformer3DModel,
    CogVideoXTransformer3DModel,
    ConsisIDTransformer3DModel,
    Cosmos3OmniTransformer,
    CosmosTransformer3DModel,
    EasyAnimateTransformer3DModel,
    HeliosTransformer3DModel,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoFramepackTransformer3DModel,
    HunyuanVideoTransformer3DModel,
    Kandinsky5Transformer3DModel,
    LatteTransformer3DModel,
    LTX2VideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    MiniMaxH3Transformer3DModel,
    MochiTransformer3DModel,
    MotifVideoTransformer3DModel,
    SkyReelsV2Transformer3DModel,
    WanAnimate2Transformer3DModel,
    WanAnimateTransformer3DModel,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
)
from diffusers.models.transformers.transformer_kandinsky6 import Kandinsky6Transformer3DModel
from diffusers.models.transformers.transformer_kandinsky6_sr import Kandinsky6SRTransformer3DModel
from diffusers.models.transformers.transformer_sana_wm_refiner import (
    SanaWMLTX2AudioVideoRotaryPosEmbed,
    SanaWMLTX2RefinerTransformer3DModel,
)
from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

WAN = dict(
    patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
    freq_dim=256, ffn_dim=32, num_layers=2,
)  # fmt: skip


def _video_and_text(batch=1):
    return {
        "hidden_states": torch.randn(batch, 4, 2, 16, 16), "timestep": torch.tensor([1] * batch),
        "encoder_hidden_states": torch.randn(batch, 12, 16),
    }  # fmt: skip


def _text_mask(batch=2, length=7):
    """The last sample's text is three tokens shorter."""
    mask = torch.ones(batch, length, dtype=torch.bool)
    mask[-1, -3:] = False
    return mask


def wan():
    return WanTransformer3DModel(**WAN, rope_max_seq_len=32), _video_and_text()


def wan_i2v():
    model = WanTransformer3DModel(**WAN, rope_max_seq_len=32, image_dim=16, added_kv_proj_dim=24)
    return model, _video_and_text() | {"encoder_hidden_states_image": torch.randn(1, 257, 16)}


def wan_vace():
    model = WanVACETransformer3DModel(**WAN, rope_max_seq_len=32, vace_layers=[0], vace_in_channels=8)
    return model, _video_and_text() | {
        "control_hidden_states": torch.randn(1, 8, 2, 16, 16), "control_hidden_states_scale": torch.tensor([1.0])
    }  # fmt: skip


def wan_animate():
    model = WanAnimateTransformer3DModel(
        **WAN | {"in_channels": 12}, latent_channels=4, image_dim=16, rope_max_seq_len=32,
        motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16}, motion_encoder_size=16, motion_style_dim=8,
        motion_dim=4, motion_encoder_dim=16, face_encoder_hidden_dim=16, face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )  # fmt: skip
    return model, _video_and_text() | {
        "hidden_states": torch.randn(1, 12, 21, 8, 8), "pose_hidden_states": torch.randn(1, 4, 20, 8, 8),
        "encoder_hidden_states_image": torch.randn(1, 12, 16), "face_pixel_values": torch.randn(1, 3, 77, 16, 16),
    }  # fmt: skip


def wan_animate2():
    model = WanAnimate2Transformer3DModel(
        patch_size=(1, 2, 2), text_len=16, in_dim=36, dim=128, ffn_dim=64, freq_dim=64, text_dim=32, out_dim=16,
        num_heads=4, num_layers=2, use_img_emb=False,
    )  # fmt: skip
    return model, {
        "hidden_states": [torch.randn(16, 2, 12, 12)], "timestep": torch.tensor([1.0]),
        "encoder_hidden_states": [torch.randn(8, 32)], "condition_latents": [torch.randn(20, 2, 12, 12)],
        "kv_cache": WanAnimate2KVCache(2), "kv_cache_mode": "extract", "seq_len": 72,
        "offset_grid_sizes": torch.tensor([[2, 6, 6]]),
    }  # fmt: skip


def chronoedit():
    return ChronoEditTransformer3DModel(**WAN, rope_max_seq_len=32), _video_and_text()


def skyreels():
    return SkyReelsV2Transformer3DModel(**WAN, rope_max_seq_len=32), _video_and_text()


def anyflow():
    inputs = _video_and_text() | {"r_timestep": torch.tensor([0.5])}
    inputs |= {"hidden_states": inputs["hidden_states"].transpose(1, 2), "timestep": torch.full((1, 2), 500.0)}
    return AnyFlowTransformer3DModel(**WAN, rope_max_seq_len=32), inputs | {"r_timestep": torch.full((1, 2), 250.0)}


def anyflow_far():
    model = AnyFlowFARTransformer3DModel(**WAN, rope_max_seq_len=32, compressed_patch_size=(1, 4, 4))
    return model, {
        "hidden_states": torch.randn(1, 4, 4, 16, 16), "timestep": torch.full((1, 4), 500.0),
        "r_timestep": torch.full((1, 4), 250.0), "encoder_hidden_states": torch.randn(1, 12, 16),
        "chunk_partition": [2, 2],
    }  # fmt: skip


def helios():
    model = HeliosTransformer3DModel(**WAN, rope_dim=(4, 4, 4), is_amplify_history=True)
    ones = torch.ones(1, 1)
    return model, _video_and_text() | {
        "indices_hidden_states": torch.ones(1, 2), "indices_latents_history_short": ones,
        "indices_latents_history_mid": ones, "indices_latents_history_long": torch.ones(1, 4),
        "latents_history_short": torch.randn(1, 4, 1, 16, 16), "latents_history_mid": torch.randn(1, 4, 1, 16, 16),
        "latents_history_long": torch.randn(1, 4, 4, 16, 16),
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


LTX2 = dict(
    in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
    audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=4,
    audio_cross_attention_dim=8, num_layers=2, caption_channels=16, rope_double_precision=False,
)  # fmt: skip


def ltx2():
    return LTX2VideoTransformer3DModel(**LTX2), {
        "hidden_states": torch.randn(2, 128, 4), "audio_hidden_states": torch.randn(2, 70, 4),
        "encoder_hidden_states": torch.randn(2, 6, 16), "audio_encoder_hidden_states": torch.randn(2, 6, 16),
        "timestep": torch.tensor([1.0, 1.0]), "encoder_attention_mask": torch.ones(2, 6).bool(), "num_frames": 2,
        "height": 8, "width": 8, "audio_num_frames": 70, "fps": 25.0,
    }  # fmt: skip


def sana_wm_refiner():
    rope = SanaWMLTX2AudioVideoRotaryPosEmbed(
        dim=16, patch_size=1, patch_size_t=1, base_num_frames=20, base_height=2048, base_width=2048,
        scale_factors=(8, 32, 32), modality="video", double_precision=False, num_attention_heads=2,
    )  # fmt: skip
    return SanaWMLTX2RefinerTransformer3DModel(**LTX2), {
        "hidden_states": torch.randn(2, 128, 4), "encoder_hidden_states": torch.randn(2, 8, 16),
        "timestep": torch.rand(2, 128) * 1000,
        "video_rotary_emb": rope(rope.prepare_video_coords(2, 2, 8, 8, device="cpu", fps=24.0), device="cpu"),
        "encoder_attention_mask": torch.ones(2, 8),
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


def consisid():
    model = ConsisIDTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=2,
        text_embed_dim=8, num_layers=1, sample_width=8, sample_height=8, sample_frames=9, patch_size=2,
        temporal_compression_ratio=4, max_text_seq_length=8,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 3, 4, 8, 8), "timestep": torch.tensor([1]),
        "encoder_hidden_states": torch.randn(1, 8, 8),
    }  # fmt: skip


def cosmos():
    model = CosmosTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2, mlp_ratio=2,
        text_embed_dim=16, adaln_lora_dim=4, max_size=(4, 32, 32), patch_size=(1, 2, 2),
        extra_pos_embed_type="learnable", concat_padding_mask=False,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 4, 1, 16, 16), "timestep": torch.tensor([1.0]),
        "encoder_hidden_states": torch.randn(1, 6, 16), "attention_mask": torch.ones(1, 6), "fps": 30,
    }  # fmt: skip


def cosmos3():
    model = Cosmos3OmniTransformer(
        head_dim=6, hidden_size=24, intermediate_size=24, latent_channel=2, latent_patch_size=1,
        num_attention_heads=4, num_hidden_layers=2, num_key_value_heads=2, patch_latent_dim=2, rope_axes_dim=[1, 1, 1],
        vocab_size=32,
    )  # fmt: skip
    vision = torch.arange(5, 69)
    return model, {
        "input_ids": torch.arange(1, 6), "text_indexes": torch.arange(5),
        "position_ids": torch.arange(69)[None].expand(3, 69), "und_len": 5, "sequence_length": 69,
        "vision_tokens": [torch.randn(1, 2, 1, 8, 8)], "vision_token_shapes": [(1, 8, 8)],
        "vision_sequence_indexes": vision, "vision_mse_loss_indexes": vision, "vision_timesteps": torch.ones(64),
        "vision_noisy_frame_indexes": [torch.tensor([0])],
    }  # fmt: skip


def easyanimate():
    model = EasyAnimateTransformer3DModel(
        attention_head_dim=16, num_attention_heads=2, in_channels=4, mmdit_layers=1, num_layers=2, out_channels=4,
        patch_size=2, text_embed_dim=16, time_embed_dim=8,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 4, 2, 16, 16), "timestep": torch.tensor([3]),
        "encoder_hidden_states": torch.randn(1, 9, 16),
    }  # fmt: skip


HUNYUAN = dict(
    in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_refiner_layers=1,
    text_embed_dim=16, rope_axes_dim=(2, 4, 4),
)  # fmt: skip


def hunyuan_video():
    model = HunyuanVideoTransformer3DModel(
        **HUNYUAN, num_layers=1, num_single_layers=1, pooled_projection_dim=8, guidance_embeds=True
    )
    return model, {
        "hidden_states": torch.randn(2, 4, 2, 16, 16), "timestep": torch.tensor([1, 1]),
        "encoder_hidden_states": torch.randn(2, 7, 16), "encoder_attention_mask": _text_mask().long(),
        "pooled_projections": torch.randn(2, 8), "guidance": torch.tensor([1.0, 1.0]),
    }  # fmt: skip


def hunyuan_video15():
    model = HunyuanVideo15Transformer3DModel(
        **HUNYUAN, num_layers=2, text_embed_2_dim=8, image_embed_dim=12, target_size=16, task_type="t2v"
    )
    return model, {
        "hidden_states": torch.randn(2, 4, 1, 8, 8), "timestep": torch.tensor([1.0, 1.0]),
        "encoder_hidden_states": torch.randn(2, 6, 16), "encoder_attention_mask": _text_mask(2, 6),
        "encoder_hidden_states_2": torch.randn(2, 4, 8), "encoder_attention_mask_2": torch.ones(2, 4).bool(),
        "image_embeds": torch.zeros(2, 3, 12),
    }  # fmt: skip


def framepack():
    model = HunyuanVideoFramepackTransformer3DModel(
        **HUNYUAN, num_layers=1, num_single_layers=1, pooled_projection_dim=8, has_image_proj=True, image_proj_dim=16,
        has_clean_x_embedder=True,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 4, 3, 8, 8), "timestep": torch.tensor([1]),
        "encoder_hidden_states": torch.randn(1, 7, 16), "encoder_attention_mask": torch.ones(1, 7),
        "pooled_projections": torch.randn(1, 8), "guidance": torch.tensor([1.0]),

        "image_embeds": torch.randn(1, 5, 16), "indices_latents": torch.ones(3),
        "latents_clean": torch.randn(1, 4, 2, 8, 8),
        "indices_latents_clean": torch.ones(2), "latents_history_2x": torch.randn(1, 4, 2, 8, 8),
        "indices_latents_history_2x": torch.ones(2), "latents_history_4x": torch.randn(1, 4, 8, 8, 8),
        "indices_latents_history_4x": torch.ones(8),
    }  # fmt: skip


def kandinsky5():
    model = Kandinsky5Transformer3DModel(
        in_visual_dim=4, out_visual_dim=4, in_text_dim=16, in_text_dim2=16, time_dim=16, patch_size=(1, 2, 2),
        model_dim=24, ff_dim=32, num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 4, 4),
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 1, 16, 16, 4), "encoder_hidden_states": torch.randn(1, 6, 16),
        "timestep": torch.tensor([1]), "pooled_projections": torch.randn(1, 16),
        "visual_rope_pos": [torch.arange(1), torch.arange(8), torch.arange(8)], "text_rope_pos": torch.arange(6),
    }  # fmt: skip


def kandinsky6():
    model = Kandinsky6Transformer3DModel(
        in_visual_dim=4, out_visual_dim=4, in_text_dim=8, in_text_dim2=8, time_dim=16, model_dim=48, ff_dim=64,
        num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 4, 4), in_audio_dim=4, out_audio_dim=4,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 1, 16, 16, 9), "encoder_hidden_states": torch.randn(1, 6, 8),
        "pooled_projections": torch.randn(1, 8), "timestep": torch.tensor([3.0]),
        "audio_hidden_states": torch.randn(1, 70, 4),
    }  # fmt: skip


def kandinsky6_sr():
    model = Kandinsky6SRTransformer3DModel(
        in_visual_dim=4, out_visual_dim=8, time_dim=16, patch_size=(1, 2, 2), model_dim=24, ff_dim=32,
        num_visual_blocks=2, axes_dims=(4, 4, 4),
    )  # fmt: skip
    return model, {"hidden_states": torch.randn(1, 2, 16, 16, 9), "timestep": torch.tensor([3.0])}


def latte():
    model = LatteTransformer3DModel(
        sample_size=16, num_layers=1, patch_size=2, attention_head_dim=4, num_attention_heads=2, caption_channels=8,
        in_channels=4, cross_attention_dim=8, out_channels=8, attention_bias=True, activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False,
        video_length=2,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 4, 2, 16, 16), "encoder_hidden_states": torch.randn(1, 6, 8),
        "timestep": torch.tensor([1]), "enable_temporal_attentions": True,
    }  # fmt: skip


def allegro():
    model = AllegroTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, num_layers=1,
        cross_attention_dim=24, sample_width=16, sample_height=16, sample_frames=2, caption_channels=16,
    )  # fmt: skip
    grid = torch.cartesian_prod(torch.arange(2), torch.arange(8), torch.arange(8)).T.reshape(3, 1, -1).contiguous()
    angles = tuple((torch.rand(n, 4).cos(), torch.rand(n, 4).sin()) for n in (2, 8, 8))
    return model, {
        "hidden_states": torch.randn(1, 4, 2, 16, 16), "encoder_hidden_states": torch.randn(1, 6, 16),
        "timestep": torch.tensor([1]), "attention_mask": torch.ones(1, 2, 16, 16),
        "encoder_attention_mask": torch.ones(1, 6), "image_rotary_emb": (angles, grid),
    }  # fmt: skip


def minimax_h3():
    model = MiniMaxH3Transformer3DModel(
        num_attention_heads=2, attention_head_dim=16, hidden_size=24, num_layers=2, num_refiner_layers=1, ffn_dim=32,
        in_channels=4, audio_in_channels=6, text_dim=8, freq_dim=8, time_embed_hidden_dim=24, time_embed_dim=16,
        rope_freq_dim=2,
    )  # fmt: skip
    tags = torch.tensor([1] * 5 + [2] * 6 + [0] * 64)
    return model, {
        "hidden_states": torch.randn(2, 64, 16), "audio_hidden_states": torch.randn(2, 6, 6),
        "encoder_hidden_states": torch.randn(2, 5, 8), "timestep": torch.tensor([0.7, 0.3]),
        "timestep_indices": (tags == 2).long(), "token_tags": tags, "position_ids": torch.rand(75, 3) * 8,
        "text_indices": torch.arange(5), "audio_indices": torch.arange(5, 11), "video_indices": torch.arange(11, 75),
    }  # fmt: skip


def mochi():
    model = MochiTransformer3DModel(
        patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16,
        in_channels=4, text_embed_dim=16, time_embed_dim=4, max_sequence_length=16,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 4, 2, 16, 16), "encoder_hidden_states": torch.randn(2, 7, 16),
        "timestep": torch.tensor([1, 1]), "encoder_attention_mask": _text_mask(),
    }  # fmt: skip


def motif():
    model = MotifVideoTransformer3DModel(
        in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=2,
        num_decoder_layers=1, text_embed_dim=16, image_embed_dim=12, rope_axes_dim=(2, 4, 4),
        enable_text_cross_attention_dual=True, enable_text_cross_attention_single=True,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 9, 2, 16, 16), "timestep": torch.tensor([1, 1]),
        "encoder_hidden_states": torch.randn(2, 7, 16), "encoder_attention_mask": _text_mask(),
        "image_embeds": torch.randn(2, 4, 12),
    }  # fmt: skip


# Name -> maker, SLA layers[, text tokens per layer[, SLA calls per layer]].
MODELS = {
    "wan": (wan, 2), "wan_i2v": (wan_i2v, 2), "wan_vace": (wan_vace, 3), "wan_animate": (wan_animate, 2),
    "wan_animate2": (wan_animate2, 2), "chronoedit": (chronoedit, 2), "skyreels": (skyreels, 2),
    "anyflow": (anyflow, 2), "helios": (helios, 2), "ltx": (ltx, 1),
    "ltx2": (ltx2, 4), "sana_wm_refiner": (sana_wm_refiner, 2), "cogvideox": (cogvideox, 1, 8),
    "consisid": (consisid, 1, 8), "cosmos": (cosmos, 2), "cosmos3": (cosmos3, 2, 5),
    "easyanimate": (easyanimate, 2, 9), "hunyuan_video": (hunyuan_video, 2, 7),
    "hunyuan_video15": (hunyuan_video15, 2, 13), "framepack": (framepack, 2, 12), "kandinsky5": (kandinsky5, 2),
    "kandinsky6": (kandinsky6, 4), "latte": (latte, 2), "allegro": (allegro, 1),
    "minimax_h3": (minimax_h3, 2, 5), "mochi": (mochi, 2, 7, 2), "motif": (motif, 3, 11),
}  # fmt: skip
REFUSED = {"anyflow_far": anyflow_far, "kandinsky6_sr": kandinsky6_sr}
