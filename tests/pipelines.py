"""Tiny random pipelines, made of the models in models.py, with text encoders that need no download."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    LTXPipeline,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
)
from models import make
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from diffusers_sla.apply import component_models, self_attention_layers
from diffusers_sla.config import SLAConfig
from diffusers_sla.lora import LORA_NAME


def tokenizer(length):
    words = ["<pad>", "<eos>", "<unk>", *["a", "red", "blue", "cat", "dog", "on", "in", "the", "grass", "photo", "of"]]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=length
    )


def vae(channels=4):
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8), latent_channels=channels, norm_num_groups=4, sample_size=32,
        shift_factor=0.1, scaling_factor=0.5,
    ).eval()  # fmt: skip


def clip(hidden, kind=CLIPTextModel):
    torch.manual_seed(0)
    return kind(
        CLIPTextConfig(
            vocab_size=16, hidden_size=hidden, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=0, projection_dim=hidden,
        )
    ).eval()  # fmt: skip


def t5(kind, config, hidden):
    torch.manual_seed(0)
    return kind(config(vocab_size=16, d_model=hidden, d_kv=8, d_ff=16, num_layers=1, num_heads=2)).eval()


def dit():
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    pipe = DiTPipeline(make("dit")[0], vae(), scheduler, id2label={0: "cat", 1: "dog"})
    pipe.register_to_config(id2label={"0": "cat", "1": "dog"})
    return pipe


def sd():
    return StableDiffusionPipeline(
        vae(), clip(8), tokenizer(16), make("unet")[0],
        DDIMScheduler(prediction_type="v_prediction", steps_offset=1, clip_sample=False), None, None,
        requires_safety_checker=False,
    )  # fmt: skip


def flux():
    return FluxPipeline(
        FlowMatchEulerDiscreteScheduler(), vae(1), clip(32), tokenizer(16), t5(T5EncoderModel, T5Config, 32),
        tokenizer(9), make("flux")[0],
    )  # fmt: skip


def wan():
    model = AutoencoderKLWan(
        base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
    )  # fmt: skip
    model.register_to_config(latents_mean=[0.1] * 4, latents_std=[0.5] * 4)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return WanPipeline(tokenizer(12), t5(UMT5EncoderModel, UMT5Config, 16), model.eval(), scheduler, make("wan")[0])


def sdxl():
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16), norm_num_groups=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=16, attention_head_dim=2,
        layers_per_block=1, sample_size=16, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=56,
    )  # fmt: skip
    second = clip(8, CLIPTextModelWithProjection)
    return StableDiffusionXLPipeline(
        vae(), clip(8), second, tokenizer(16), tokenizer(16), unet, EulerDiscreteScheduler()
    )


def sd3():
    encoders = {}
    for suffix in ("", "_2"):
        encoders[f"text_encoder{suffix}"] = clip(8, CLIPTextModelWithProjection)
        encoders[f"tokenizer{suffix}"] = tokenizer(16)
    return StableDiffusion3Pipeline(
        transformer=make("sd3")[0], scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae(),
        text_encoder_3=t5(T5EncoderModel, T5Config, 32), tokenizer_3=tokenizer(16), **encoders,
    )  # fmt: skip


def pixart():
    transformer = PixArtTransformer2DModel(
        num_layers=1, num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, sample_size=32,
        patch_size=4, cross_attention_dim=16, caption_channels=8, norm_num_groups=1, use_additional_conditions=False,
    )  # fmt: skip
    return PixArtAlphaPipeline(
        tokenizer(8), t5(T5EncoderModel, T5Config, 8), vae(), transformer, DPMSolverMultistepScheduler()
    )


def ltx():
    model = AutoencoderKLLTXVideo(
        latent_channels=4, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5, patch_size=1,
        spatio_temporal_scaling=(True, True, False, False), decoder_spatio_temporal_scaling=(True, True, False, False),
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return LTXPipeline(scheduler, model.eval(), t5(T5EncoderModel, T5Config, 8), tokenizer(8), make("ltx")[0])


def cogvideox():
    model = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8,) * 4, latent_channels=4, layers_per_block=1, norm_num_groups=2,
    )  # fmt: skip
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=2,
        text_embed_dim=8, num_layers=1, sample_width=8, sample_height=8, sample_frames=5, patch_size=2,
        temporal_compression_ratio=4, max_text_seq_length=226,
    )  # fmt: skip
    scheduler = CogVideoXDDIMScheduler(prediction_type="v_prediction")
    return CogVideoXPipeline(
        tokenizer(226), t5(T5EncoderModel, T5Config, 8), model.eval(), transformer.eval(), scheduler
    )


PIPELINES = {
    "dit": dit, "sd": sd, "flux": flux, "wan": wan, "sdxl": sdxl, "sd3": sd3, "pixart": pixart, "ltx": ltx,
    "cogvideox": cogvideox,
}  # fmt: skip
# What makes each small: pixels, and frames for a video.
SIZES = {
    "dit": {}, "sd": {"height": 32, "width": 32}, "flux": {"height": 32, "width": 32},
    "wan": {"height": 64, "width": 64, "num_frames": 5}, "sdxl": {"height": 32, "width": 32},
    "sd3": {"height": 32, "width": 32}, "pixart": {"height": 64, "width": 64},
    "ltx": {"height": 32, "width": 32, "num_frames": 5}, "cogvideox": {"height": 64, "width": 64, "num_frames": 5},
}  # fmt: skip


def write_lora(model_or_pipe, folder, rank=2):
    """A random LoRA on to_q of every self-attention layer, as `finetune` writes it."""
    tensors = {}
    generator = torch.Generator().manual_seed(1)
    models = component_models(model_or_pipe)
    for layer in self_attention_layers(model_or_pipe, SLAConfig()):
        component, _, path = layer.partition(".")
        outputs, inputs = models[component].get_submodule(path).to_q.weight.shape
        tensors[f"{layer}.to_q.lora_A.weight"] = torch.randn(rank, inputs, generator=generator)
        tensors[f"{layer}.to_q.lora_B.weight"] = torch.randn(outputs, rank, generator=generator)
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(tensors, Path(folder) / LORA_NAME, metadata={"format": "pt"})


def make_pipeline(name):
    torch.manual_seed(0)
    pipe = PIPELINES[name]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_dit():
    """A class-conditional pipeline of 64x64 pixels: 2 layers, 2 heads of 8, 1024 tokens; classes "cat" and "dog"."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=64,
        mid_block_add_attention=False,
    )  # fmt: skip
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2, sample_size=32,
        patch_size=1, num_embeds_ada_norm=1000,
    )  # fmt: skip
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    pipe = DiTPipeline(
        transformer.eval(),
        vae.eval(),
        DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        id2label={0: "cat", 1: "dog"},
    )
    pipe.register_to_config(id2label={"0": "cat", "1": "dog"})
    pipe.set_progress_bar_config(disable=True)
    return pipe
