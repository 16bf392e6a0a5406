"""Tiny random pipelines, made of the models in models.py, with text encoders that need no download."""

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusionPipeline,
    UniPCMultistepScheduler,
    WanPipeline,
)
from models import make
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)


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


def clip(hidden):
    torch.manual_seed(0)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=16, hidden_size=hidden, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
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


PIPELINES = {"dit": dit, "sd": sd, "flux": flux, "wan": wan}
# What makes each small: pixels, and frames for a video.
SIZES = {
    "dit": {}, "sd": {"height": 32, "width": 32}, "flux": {"height": 32, "width": 32},
    "wan": {"height": 64, "width": 64, "num_frames": 5},
}  # fmt: skip


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
