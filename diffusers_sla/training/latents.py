"""From pixels to what a denoiser takes: the VAE, its scaling, and a pipeline's way of packing latents into tokens."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SLAUnsupportedError


@torch.no_grad()
def encode_pixels(pipe: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the scaled latents of pixels [B, 3, (F,) H, W] in [-1, 1], float32.

    Computed in float32, as some VAEs overflow in half precision; the VAE's dtype is what it was afterwards.
    The scaling is what the VAE's config says: (x - mean) * scaling / std with its latents_mean and latents_std where
    it has them, (x - shift_factor) * scaling_factor elsewhere.
    """
    vae = pipe.vae
    if any(isinstance(module, nn.Conv3d) for module in vae.modules()) and pixels.dim() == 4:
        pixels = pixels[:, :, None]
    dtype = vae.dtype
    with torch.autocast(vae.device.type, enabled=False):
        posterior = vae.to(torch.float32).encode(pixels.to(vae.device, torch.float32)).latent_dist
    vae.to(dtype)
    mean, deviation = posterior.mean.float(), posterior.std.float()
    scaling = getattr(vae.config, "scaling_factor", None) or 1.0
    shape = (1, -1, *([1] * (mean.dim() - 2)))
    known = dict(vae.config) | dict(vae.named_buffers())  # LTX keeps them as buffers
    centre, spread = known.get("latents_mean"), known.get("latents_std")
    if centre is not None and spread is not None:
        centre, spread = (torch.as_tensor(x, device=mean.device).float().view(shape) for x in (centre, spread))
        return (mean - centre) * scaling / spread, deviation * scaling / spread
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    return (mean - shift) * scaling, deviation * scaling


def pack(pipe: Any, latents: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Scaled latents [B, C, (F,) H, W] as the denoiser takes them, [B, *shape].

    Raises:
        SLAUnsupportedError: They do not come out in that shape: another size, or a packing that is not known.
    """
    packed = latents
    packing = getattr(pipe, "_pack_latents", None)
    if packing is not None:
        names = list(inspect.signature(packing).parameters)
        if names == ["latents", "batch_size", "num_channels_latents", "height", "width"]:
            packed = packing(latents.contiguous(), len(latents), latents.shape[1], *latents.shape[-2:])
        elif names == ["latents", "patch_size", "patch_size_t"]:
            config = pipe.transformer.config
            packed = packing(latents, config.patch_size, config.patch_size_t)
    elif type(pipe).__name__.startswith("CogVideoX"):
        packed = latents.transpose(1, 2)
    if tuple(packed.shape[1:]) != shape:
        raise SLAUnsupportedError(
            f"{type(pipe).__name__} gives its denoiser samples of shape {shape}; latents of shape "
            f"{tuple(latents.shape[1:])} become {tuple(packed.shape[1:])}. Check height, width and num_frames; for "
            "pipelines that add to the sample (inpainting, image to video) use objective 'distill' without data"
        )
    return packed
