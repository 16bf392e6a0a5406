"""What the quality table measures of a model: held-out loss, distance of its images to dense ones, attention."""

import math
import time

import torch
import torch.nn.functional as F

from diffusers_sla import sla_layers
from diffusers_sla.apply import watch_attention


@torch.no_grad()
def held_out_loss(model, flow_loss, latents, labels, batch):
    """Mean flow-matching loss of held-out latents at fixed noise and noise levels."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    sigma = ((torch.arange(len(latents), device=latents.device) * 7) % len(latents) + 0.5) / len(latents)
    parts = zip(*(x.split(batch) for x in (latents, noise, sigma, labels)), strict=True)
    return sum(flow_loss(model, *part).item() * len(part[0]) for part in parts) / len(latents)


@torch.no_grad()
def attention_error(model, flow_loss, latents, labels):
    """Mean over layers of ||SLA - dense|| / ||dense|| for the inputs each layer gets, at five noise levels."""
    layers = sla_layers(model)
    if not layers:
        return 0.0
    sums = {name: [0.0, 0.0] for name in layers}
    inner = {name: layer.watch for name, layer in layers.items()}

    def watcher(name):
        def watch(processor, query, key, value, key_mask, kept, run):
            output = inner[name](processor, query, key, value, key_mask, kept, run) if inner[name] else run()
            dense = F.scaled_dot_product_attention(query.float(), key.float(), value.float())
            sums[name][0] += (output.float() - dense).square().sum().item()
            sums[name][1] += dense.square().sum().item()
            return output

        return watch

    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    with watch_attention(model, {name: watcher(name) for name in layers}):
        for level in (0.1, 0.3, 0.5, 0.7, 0.9):
            flow_loss(model, latents, noise, torch.full((len(latents),), level, device=latents.device), labels)
    return sum(math.sqrt(wrong / total) for wrong, total in sums.values()) / len(sums)


@torch.no_grad()
def images(pipe, class_ids, steps, batch=12, guidance_scale=1.0):
    """Pixels [N, 3, H, W] in [0, 1] of one image per class, the same noise every time, and the seconds it took."""
    device = pipe.transformer.device
    wait(device)
    started = time.monotonic()
    pixels = []
    for part in torch.tensor(class_ids).split(batch):
        generator = [torch.Generator().manual_seed(1000 + int(i)) for i in part]
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            output = pipe(
                part.tolist(), guidance_scale=guidance_scale, generator=generator, num_inference_steps=steps,
                output_type="np",
            )  # fmt: skip
        pixels.append(torch.from_numpy(output.images).permute(0, 3, 1, 2))
    wait(device)
    return torch.cat(pixels).float(), time.monotonic() - started


def psnr(a, b):
    """Mean over images of the peak signal-to-noise ratio in dB; values in [0, 1]."""
    errors = (a - b).square().flatten(1).mean(1)
    return (10 * torch.log10(1 / errors.clamp(min=1e-10))).mean().item()


def ssim(a, b):
    """Mean structural similarity (Wang et al. 2004): Gaussian window of 11, sigma 1.5; values in [0, 1]."""
    x = torch.arange(11, dtype=a.dtype) - 5
    g = torch.exp(-x.square() / (2 * 1.5**2))
    g = g / g.sum()
    window = (g[:, None] * g[None]).expand(a.shape[1], 1, 11, 11)

    def blur(image):
        return F.conv2d(image, window, groups=image.shape[1])

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a.square(), blur(b * b) - mean_b.square()
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    ratio = ((2 * mean_a * mean_b + c1) * (2 * covariance + c2)) / (
        (mean_a.square() + mean_b.square() + c1) * (var_a + var_b + c2)
    )
    return ratio.mean().item()


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
