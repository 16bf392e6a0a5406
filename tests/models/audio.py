"""Tiny audio and other one-dimensional transformers."""

import torch
from diffusers import (
    AceStepTransformer1DModel,
    LongCatAudioDiTTransformer,
    StableAudioDiTModel,
)
from diffusers.models.transformers.t5_film_transformer import T5FilmDecoder
from diffusers.models.transformers.transformer_minimax_music3 import MiniMaxMusic3Transformer1DModel
from diffusers.models.transformers.transformer_stable_audio3 import StableAudio3DiTModel
from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel


def ace_step():
    model = AceStepTransformer1DModel(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, in_channels=24, audio_acoustic_hidden_dim=8, patch_size=2, rope_theta=10000.0, sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 128, 8), "timestep": torch.rand(2), "timestep_r": torch.rand(2),
        "encoder_hidden_states": torch.randn(2, 10, 32), "context_latents": torch.randn(2, 128, 16),
    }  # fmt: skip


def longcat_audio():
    model = LongCatAudioDiTTransformer(
        dit_dim=32, dit_depth=2, dit_heads=2, dit_text_dim=16, latent_dim=8, text_conv=False
    )
    mask = torch.ones(2, 64, dtype=torch.bool)
    mask[1, 50:] = False
    return model, {
        "hidden_states": torch.randn(2, 64, 8), "encoder_hidden_states": torch.randn(2, 6, 16),
        "encoder_attention_mask": torch.ones(2, 6, dtype=torch.bool), "timestep": torch.tensor([1.0, 1.0]),
        "attention_mask": mask, "latent_cond": torch.randn(2, 64, 8),
    }  # fmt: skip


def stable_audio():
    model = StableAudioDiTModel(
        sample_size=4, in_channels=8, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        num_key_value_attention_heads=2, out_channels=8, cross_attention_dim=16, time_proj_dim=8,
        global_states_input_dim=16, cross_attention_input_dim=16,
    )  # fmt: skip
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    return model, {
        "hidden_states": torch.randn(1, 8, 64), "timestep": torch.tensor([1.0]),
        "encoder_hidden_states": torch.randn(1, 6, 16), "global_hidden_states": torch.randn(1, 1, 16),
        "rotary_embedding": get_1d_rotary_pos_embed(4, 65, use_real=True, repeat_interleave_real=False),
    }  # fmt: skip


def stable_audio3():
    model = StableAudio3DiTModel(
        io_channels=8, embed_dim=32, depth=2, num_heads=4, cond_token_dim=16, global_cond_dim=12, local_add_cond_dim=5,
        timestep_features_dim=16, ff_mult=2, num_memory_tokens=3,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 8, 64), "timestep": torch.rand(2),
        "encoder_hidden_states": torch.randn(2, 4, 16), "global_hidden_states": torch.randn(2, 12),
    }  # fmt: skip


def minimax_music():
    model = MiniMaxMusic3Transformer1DModel(
        in_channels=8, condition_dim=16, num_layers=2, num_attention_heads=2, attention_head_dim=16, ff_inner_dim=32,
        rotary_dim=8, fourier_embedding_dim=16,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(1, 8, 64), "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": torch.randn(1, 64, 16),
    }  # fmt: skip


def spectrogram():
    model = T5FilmDecoder(
        input_dims=8, targets_length=64, d_model=16, num_layers=2, num_heads=2, d_kv=8, d_ff=16, dropout_rate=0.0
    )
    return model, {
        "encodings_and_masks": [(torch.randn(1, 5, 16), torch.ones(1, 5))],
        "decoder_input_tokens": torch.randn(1, 64, 8), "decoder_noise_time": torch.tensor([0.5]),
    }  # fmt: skip


def temporal():
    model = TransformerTemporalModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=16, norm_num_groups=4, num_layers=1
    )
    return model, {"hidden_states": torch.randn(64, 16, 2, 2), "num_frames": 64}


# Name -> maker, SLA layers[, text tokens per layer[, SLA calls per layer]].
MODELS = {
    "ace_step": (ace_step, 1), "longcat_audio": (longcat_audio, 2), "stable_audio": (stable_audio, 2),
    "stable_audio3": (stable_audio3, 2, 0, 2), "minimax_music": (minimax_music, 2),
    "temporal": (temporal, 2),
}  # fmt: skip
REFUSED = {"spectrogram": spectrogram}
