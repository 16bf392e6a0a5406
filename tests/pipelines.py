"""Tiny random diffusers pipelines."""

import torch
from diffusers import AutoencoderKL, DiTPipeline, DiTTransformer2DModel, DPMSolverMultistepScheduler


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
