"""Tiny UNets."""

import torch
from diffusers import (
    AudioLDM2UNet2DConditionModel,
    ControlNetModel,
    I2VGenXLUNet,
    Kandinsky3UNet,
    StableCascadeUNet,
    UNet2DConditionModel,
    UNet2DModel,
    UNet3DConditionModel,
    UNetControlNetXSModel,
    UNetMotionModel,
    UNetSpatioTemporalConditionModel,
    UVit2DModel,
)
from diffusers.models.unets.unet_dreamlite import DreamLiteUNetModel


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


def unet_2d():
    model = UNet2DModel(
        block_out_channels=(8, 16), norm_num_groups=4, down_block_types=("AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D"), attention_head_dim=4, layers_per_block=1, sample_size=16,
    )  # fmt: skip
    return model, {"sample": torch.randn(2, 3, 16, 16), "timestep": torch.tensor([10])}


def unet_3d():
    model = UNet3DConditionModel(
        block_out_channels=(8, 16), norm_num_groups=4, down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"), cross_attention_dim=8, attention_head_dim=4,
        layers_per_block=1, sample_size=16,
    )  # fmt: skip
    return model, {
        "sample": torch.randn(1, 4, 3, 16, 16), "timestep": torch.tensor([10]),
        "encoder_hidden_states": torch.randn(1, 7, 8),
    }  # fmt: skip


def motion():
    model = UNetMotionModel(
        block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"), cross_attention_dim=8, num_attention_heads=2,
        motion_num_attention_heads=2, layers_per_block=1, sample_size=16, motion_max_seq_length=40,
    )  # fmt: skip
    return model, {
        "sample": torch.randn(1, 4, 3, 16, 16), "timestep": torch.tensor([10]),
        "encoder_hidden_states": torch.randn(3, 7, 8),
    }  # fmt: skip


def svd():
    model = UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 64), down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), cross_attention_dim=8,
        num_attention_heads=2, layers_per_block=1, sample_size=16, addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
    )  # fmt: skip
    return model, {
        "sample": torch.randn(1, 2, 8, 16, 16), "timestep": torch.tensor([10]),
        "encoder_hidden_states": torch.randn(1, 1, 8), "added_time_ids": torch.tensor([[6.0, 127.0, 0.02]]),
    }  # fmt: skip


def i2vgen():
    model = I2VGenXLUNet(
        block_out_channels=(8, 16), norm_num_groups=4, down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"), cross_attention_dim=8, attention_head_dim=4,
        num_attention_heads=None, layers_per_block=1, sample_size=16,
    )  # fmt: skip
    return model, {
        "sample": torch.randn(1, 4, 3, 16, 16), "timestep": torch.tensor([10]), "fps": torch.tensor([4]),
        "image_latents": torch.randn(1, 4, 3, 16, 16), "image_embeddings": torch.randn(1, 8),
        "encoder_hidden_states": torch.randn(1, 7, 8),
    }  # fmt: skip


def kandinsky3():
    model = Kandinsky3UNet(
        time_embedding_dim=16, groups=2, attention_head_dim=4, layers_per_block=3, block_out_channels=(8, 16),
        cross_attention_dim=8, encoder_hid_dim=8,
    )  # fmt: skip
    return model, {
        "sample": torch.randn(1, 4, 16, 16), "timestep": torch.tensor([10]),
        "encoder_hidden_states": torch.randn(1, 7, 8), "encoder_attention_mask": torch.ones(1, 7),
    }  # fmt: skip


def cascade():
    model = StableCascadeUNet(
        in_channels=4, out_channels=4, timestep_ratio_embedding_dim=8, conditioning_dim=16,
        block_out_channels=(16, 16),
        num_attention_heads=(2, 2), down_num_layers_per_block=(1, 1), up_num_layers_per_block=(1, 1),
        clip_text_in_channels=8, clip_text_pooled_in_channels=8, clip_image_in_channels=8, clip_seq=2,
        dropout=(0.0, 0.0),
    )  # fmt: skip
    return model, {
        "sample": torch.randn(1, 4, 8, 8), "timestep_ratio": torch.tensor([0.5]),
        "clip_text_pooled": torch.randn(1, 1, 8), "clip_text": torch.randn(1, 5, 8), "clip_img": torch.randn(1, 1, 8),
    }  # fmt: skip


def dreamlite():
    model = DreamLiteUNetModel(
        block_out_channels=(16, 32), norm_num_groups=4,
        down_block_types=("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
        up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteCrossAttnNoSelfAttnUpBlock2D"),
        cross_attention_dim=8, attention_head_dim=4, layers_per_block=1, sample_size=16,
    )  # fmt: skip
    return model, {
        "sample": torch.randn(2, 4, 16, 16), "timestep": torch.tensor([10]),
        "encoder_hidden_states": torch.randn(2, 7, 8),
    }  # fmt: skip


def audioldm2():
    model = AudioLDM2UNet2DConditionModel(
        block_out_channels=(8, 16), norm_num_groups=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=((None, 8, 8), (None, 8, 8)),
        attention_head_dim=2, layers_per_block=1, sample_size=16,
    )  # fmt: skip
    return model, {
        "sample": torch.randn(1, 4, 16, 16), "timestep": torch.tensor([10]),
        "encoder_hidden_states": torch.randn(1, 7, 8), "encoder_hidden_states_1": torch.randn(1, 5, 8),
    }  # fmt: skip


def uvit():
    model = UVit2DModel(
        hidden_size=16, cond_embed_dim=16, micro_cond_encode_dim=2, micro_cond_embed_dim=10, encoder_hidden_size=8,
        vocab_size=32, codebook_size=24, in_channels=16, block_out_channels=16, num_res_blocks=1, block_num_heads=2,
        num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, sample_size=8,
    )  # fmt: skip
    return model, {
        "input_ids": torch.randint(0, 24, (1, 8, 8)), "encoder_hidden_states": torch.randn(1, 7, 8),
        "pooled_text_emb": torch.randn(1, 16), "micro_conds": torch.rand(1, 5),
    }  # fmt: skip


def controlnet():
    model = ControlNetModel(
        block_out_channels=(8, 16), norm_num_groups=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        cross_attention_dim=8, attention_head_dim=2, layers_per_block=1, conditioning_embedding_out_channels=(8, 16),
    )  # fmt: skip
    return model, {
        "sample": torch.randn(1, 4, 16, 16), "timestep": torch.tensor([10]),
        "encoder_hidden_states": torch.randn(1, 7, 8), "controlnet_cond": torch.rand(1, 3, 32, 32),
    }  # fmt: skip


def controlnet_xs():
    model = UNetControlNetXSModel(
        block_out_channels=(8, 16), norm_num_groups=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=8, num_attention_heads=2,
        sample_size=16, ctrl_conditioning_embedding_out_channels=(2, 4), ctrl_block_out_channels=(4, 8),
        ctrl_num_attention_heads=2, ctrl_max_norm_num_groups=2,
    )  # fmt: skip
    return model, {
        "sample": torch.randn(1, 4, 16, 16), "timestep": torch.tensor([10]),
        "encoder_hidden_states": torch.randn(1, 7, 8), "controlnet_cond": torch.rand(1, 3, 32, 32),
        "conditioning_scale": 1.0,
    }  # fmt: skip


# Name -> maker, SLA layers[, text tokens per layer[, SLA calls per layer]].
MODELS = {
    "unet": (unet, 4), "unet_2d": (unet_2d, 4), "unet_3d": (unet_3d, 14), "motion": (motion, 18), "svd": (svd, 8),
    "i2vgen": (i2vgen, 15), "kandinsky3": (kandinsky3, 3), "cascade": (cascade, 4, 9), "dreamlite": (dreamlite, 4),
    "audioldm2": (audioldm2, 16), "uvit": (uvit, 1), "controlnet_xs": (controlnet_xs, 9),
}  # fmt: skip
REFUSED = {"controlnet": controlnet}
