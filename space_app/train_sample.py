"""Train the sample pipeline: stock diffusers classes, class-conditional, on freely licensed photographs.

    python space_app/train_sample.py --pack photos.npz                          # where scikit-image is installed
    python space_app/train_sample.py --photos photos.npz --out out --minutes 8.5   # on a GPU; needs no scikit-image
    python space_app/train_sample.py --photos photos.npz --folder crops         # for `diffusers-sla finetune --data`

A class per photograph. The left 4/5 of each photograph is trained on, the right 1/5 is held out. An AutoencoderKL
(256x256 pixels to 64x64 latents) is trained first, then a DiT by flow matching on 4096 latent tokens. `--out` receives
`sample_pipeline/` for `DiffusionPipeline.from_pretrained`, `samples.png` and `record.json`.
"""

import argparse
import copy
import json
import math
import platform
import time
from pathlib import Path

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DiTPipeline, DiTTransformer2DModel, DPMSolverMultistepScheduler
from PIL import Image

# Class name -> function of skimage.data, or image of sklearn.datasets. Licences: sample_pipeline/README.md.
PHOTOS = {
    "brick": "brick",
    "cat": "chelsea",
    "coffee": "coffee",
    "coins": "coins",
    "flower": "flower.jpg",
    "galaxies": "hubble_deep_field",
    "grass": "grass",
    "gravel": "gravel",
    "photographer": "camera",
    "retina": "retina",
    "rocket": "rocket",
    "temple": "china.jpg",
}
NO_LABEL = 1000  # DiTPipeline's own label for classifier-free guidance
MAX_SIDE = 768
TRAIN_SHARE = 0.8
PIXELS, LATENT_CHANNELS, DOWNSCALE = 256, 4, 4
WINDOW = 128  # the autoencoder is convolutional: it learns as much from smaller windows, and more of them
KL_WEIGHT = 2e-4
VAE_SHARE = 0.2  # of the whole time
SHIFT = 2.0  # towards noise: where the layout of an image is decided


def pack(path):
    """Write the photographs, at most MAX_SIDE pixels long, to one .npz file: class name -> uint8 [H, W, 3]."""
    import skimage.data
    from sklearn.datasets import load_sample_image

    photos = {}
    for name, source in PHOTOS.items():
        pixels = load_sample_image(source) if "." in source else getattr(skimage.data, source)()
        image = Image.fromarray(pixels).convert("RGB")
        image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
        photos[name] = np.asarray(image)
    np.savez_compressed(path, **photos)


def cut(photo, count, held_out, generator):
    """`count` random square crops of one photograph, half of them mirrored: [count, 3, PIXELS, PIXELS] uint8.

    A crop is between 1/5 of the photograph's width and all of its height: four of five close to the largest, which
    show the whole subject. Held-out crops must fit into the right 1/5 and are all of the smallest size.
    """
    height, width = photo.shape[1:]
    border = int(width * TRAIN_SHARE)
    smallest, largest = width - border, min(height, border)
    crops = torch.empty(count, 3, PIXELS, PIXELS, dtype=torch.uint8, device=photo.device)
    for i, (u_side, u_top, u_left, u_flip) in enumerate(torch.rand(count, 4, generator=generator).tolist()):
        share = u_side / 0.2 if u_side < 0.2 else 0.8 + 0.2 * (u_side - 0.2) / 0.8
        side = smallest if held_out else round(smallest + (largest - smallest) * share)
        top = int(u_top * (height - side + 1))
        left = border if held_out else int(u_left * (border - side + 1))
        crop = photo[None, :, top : top + side, left : left + side].float()
        crop = F.interpolate(crop, (PIXELS, PIXELS), mode="bicubic", antialias=True, align_corners=False)
        crops[i] = (crop.flip(3) if u_flip < 0.5 else crop)[0].round().clamp(0, 255)
    return crops


def crops_of_all(photos, count, held_out, seed):
    """Crops and their class ids: [classes * count, 3, PIXELS, PIXELS] uint8 and [classes * count] int64."""
    generator = torch.Generator().manual_seed(seed)
    crops = torch.cat([cut(photo, count, held_out, generator) for photo in photos])
    return crops, torch.arange(len(photos), device=crops.device).repeat_interleave(count)


def write_crops(path, folder, count):
    """`count` crops of each photograph's part to train on, as `finetune` reads them: a folder per class."""
    packed = np.load(path)
    photos = [torch.from_numpy(packed[name]).permute(2, 0, 1) for name in packed.files]
    crops, labels = crops_of_all(photos, count, held_out=False, seed=1)
    for i, (crop, label) in enumerate(zip(crops, labels.tolist(), strict=True)):
        target = Path(folder) / packed.files[label] / f"{i:05d}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(crop.permute(1, 2, 0).numpy()).save(target, quality=95)


def build_vae(tiny):
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16) if tiny else (32, 64, 128),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=PIXELS,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=False,
    )


def build_transformer(tiny):
    model = DiTTransformer2DModel(
        num_attention_heads=1 if tiny else 5,
        attention_head_dim=64,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=1 if tiny else 7,
        sample_size=PIXELS // DOWNSCALE,
        patch_size=1,
        num_embeds_ada_norm=NO_LABEL,
    )
    # DiT's own start: every block is the identity, the output zero.
    for block in model.transformer_blocks:
        torch.nn.init.zeros_(block.norm1.linear.weight)
        torch.nn.init.zeros_(block.norm1.linear.bias)
        torch.nn.init.normal_(block.norm1.emb.class_embedder.embedding_table.weight, std=0.02)
    for layer in (model.proj_out_1, model.proj_out_2):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    return model


class Progress:
    """What happened when: prints a line every `every` seconds and keeps it for the record."""

    def __init__(self, every):
        self.started, self.every, self.last, self.lines = time.monotonic(), every, 0.0, []

    def seconds(self):
        return time.monotonic() - self.started

    def due(self):
        return self.seconds() - self.last >= self.every

    def write(self, **values):
        self.last = self.seconds()
        line = {"seconds": round(self.last, 1)} | {
            key: round(value, 5) if isinstance(value, float) else value for key, value in values.items()
        }
        self.lines.append(line)
        print(json.dumps(line), flush=True)


def to_unit(crops):
    return crops.float().div_(127.5).sub_(1)


def train_vae(vae, crops, until, batch, progress):
    """Reconstruction (squared and absolute error) plus a small KL term, until the clock says `until` seconds."""
    vae.train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, weight_decay=0.0)
    started, step = progress.seconds(), 0
    while progress.seconds() < until:
        done = (progress.seconds() - started) / (until - started)
        optimizer.param_groups[0]["lr"] = 1.5e-3 * min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * done))
        top, left = torch.randint(0, PIXELS - WINDOW + 1, (2,)).tolist()
        index = torch.randint(len(crops), (batch,), device=crops.device)
        pixels = to_unit(crops[index, :, top : top + WINDOW, left : left + WINDOW])
        with torch.autocast(crops.device.type, torch.bfloat16, enabled=crops.is_cuda):
            mean, log_variance = vae.encoder(pixels).float().chunk(2, dim=1)
            log_variance = log_variance.clamp(-20, 10)
            latents = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
            decoded = vae.decoder(latents).float()
        squared = F.mse_loss(decoded, pixels)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        loss = squared + 0.1 * F.l1_loss(decoded, pixels) + KL_WEIGHT * kl
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        if progress.due():
            progress.write(stage="vae", step=step, psnr=10 * math.log10(4 / squared.item()), kl=kl.item())
    return step


@torch.no_grad()
def encode(vae, crops, batch):
    """Mean and standard deviation of each crop's latents, both [N, LATENT_CHANNELS, h, w] bfloat16."""
    vae.eval()
    means, deviations = [], []
    for part in crops.split(batch):
        posterior = vae.encode(to_unit(part)).latent_dist
        means.append(posterior.mean.bfloat16())
        deviations.append(posterior.std.bfloat16())
    return torch.cat(means), torch.cat(deviations)


def flow_loss(model, latents, noise, sigma, labels):
    """Flow matching: the model predicts noise - latents at (1 - sigma) latents + sigma noise."""
    noisy = torch.lerp(latents, noise, sigma[:, None, None, None])
    timestep = (sigma * 1000).long()  # the integers the scheduler will pass
    with torch.autocast(latents.device.type, torch.bfloat16, enabled=latents.is_cuda):
        prediction = model(noisy, timestep=timestep, class_labels=labels).sample
    return F.mse_loss(prediction.float(), noise - latents)


@torch.no_grad()
def fixed_loss(model, latents, labels, batch):
    """Mean flow loss on given latents with the same noise and noise levels every time."""
    generator = torch.Generator(latents.device).manual_seed(0)
    noise = torch.randn(latents.shape, generator=generator, device=latents.device)
    sigma = ((torch.arange(len(latents), device=latents.device) * 7) % len(latents) + 0.5) / len(latents)
    parts = zip(*(x.split(batch) for x in (latents, noise, sigma, labels)), strict=True)
    total = sum(flow_loss(model, *part).item() * len(part[0]) for part in parts)
    return total / len(latents)


def train_transformer(model, pool, fixed, until, batch, learning_rate, progress, compiled):
    """AdamW, cosine decay over the time that is left, exponential moving average of the weights, which it returns.

    `pool` is (means, deviations, labels) of scaled latents; `fixed` maps a name to (latents, labels) to report on.
    """
    means, deviations, labels = pool
    model.eval()  # diffusers drops the label of each block on its own in training mode; it is dropped here, for all
    average = copy.deepcopy(model).requires_grad_(False)
    forward = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01, fused=means.is_cuda)
    started, step, recent, next_check = progress.seconds(), 0, [], 0.0
    while progress.seconds() < until:
        done = (progress.seconds() - started) / (until - started)
        decay = 0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * done))
        optimizer.param_groups[0]["lr"] = learning_rate * min(1, (step + 1) / 200) * decay
        index = torch.randint(len(means), (batch,), device=means.device)
        latents = means[index] + deviations[index] * torch.randn_like(means[index])
        sigma = torch.sigmoid(torch.randn(batch, device=means.device))
        sigma = (SHIFT * sigma / (1 + (SHIFT - 1) * sigma)).clamp(0.001, 0.999)
        given = torch.where(torch.rand(batch, device=means.device) < 0.1, NO_LABEL, labels[index])
        loss = flow_loss(forward, latents.float(), torch.randn_like(latents, dtype=torch.float32), sigma, given)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        with torch.no_grad():
            weight = 1 - min(0.999, step / (step + 10))
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), weight)
        recent.append(loss.detach())
        if progress.due():
            progress.write(stage="dit", step=step, loss=torch.stack(recent).mean().item())
            recent = []
            if progress.seconds() >= next_check:
                progress.write(stage="check", step=step, **check(average, fixed, batch))
                next_check = progress.seconds() + 60
    progress.write(stage="check", step=step, **check(average, fixed, batch))
    return average, step


def check(model, fixed, batch):
    return {name: fixed_loss(model, *latents_and_labels, batch) for name, latents_and_labels in fixed.items()}


def save_pipeline(vae, transformer, names, folder):
    """One folder for `DiffusionPipeline.from_pretrained`, weights in float16."""
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT)
    pipeline = DiTPipeline(transformer, vae, scheduler, id2label=dict(enumerate(names)))
    pipeline.register_to_config(id2label={str(i): name for i, name in enumerate(names)})
    pipeline.to(torch.float16).save_pretrained(folder)


def save_samples(folder, path, device, steps):
    """A sheet with two images of every class, without and with guidance, by the pipeline as a user would load it."""
    pipeline = DiTPipeline.from_pretrained(folder, dtype=torch.float32).to(device)
    pipeline.set_progress_bar_config(disable=True)
    ids = sorted(pipeline.labels.values())
    sheet = Image.new("RGB", (PIXELS * 8, PIXELS * math.ceil(len(ids) / 4)))
    for i, class_id in enumerate(ids):
        for j, guidance in enumerate((1.0, 2.0)):
            image = pipeline(
                [class_id], guidance_scale=guidance, generator=torch.Generator(device).manual_seed(0),
                num_inference_steps=steps,
            ).images[0]  # fmt: skip
            sheet.paste(image, ((i % 4 * 2 + j) * PIXELS, i // 4 * PIXELS))
    sheet.save(path)


def train(options):
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    progress = Progress(every=2 if options.tiny else 15)
    compiled = device.type == "cuda"
    seconds = options.minutes * 60
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)

    packed = np.load(options.photos)
    names = list(packed.files)
    photos = [torch.from_numpy(packed[name]).to(device).permute(2, 0, 1) for name in names]
    crops, labels = crops_of_all(photos, 2 if options.tiny else 1024, held_out=False, seed=1)
    held_out, held_out_labels = crops_of_all(photos, 1 if options.tiny else 8, held_out=True, seed=2)
    seen, seen_labels = crops_of_all(photos, 1 if options.tiny else 8, held_out=False, seed=3)
    progress.write(stage="crops", count=len(crops))

    batch = 2 if options.tiny else 32
    if options.resume:
        vae = AutoencoderKL.from_pretrained(options.resume, subfolder="vae", dtype=torch.float32).to(device)
        model = DiTTransformer2DModel.from_pretrained(options.resume, subfolder="transformer", dtype=torch.float32).to(
            device
        )
        vae_steps = 0
    else:
        vae, model = build_vae(options.tiny).to(device), build_transformer(options.tiny).to(device)
        vae_steps = train_vae(vae, crops, VAE_SHARE * seconds, batch, progress)
    means, deviations = encode(vae, crops, batch)
    if not options.resume:
        scale = 1 / (means.float().var() + deviations.float().square().mean()).sqrt().item()
        vae.register_to_config(scaling_factor=scale)
    scale = vae.config.scaling_factor
    fixed = {
        "held_out": (encode(vae, held_out, batch)[0].float() * scale, held_out_labels),
        "seen": (encode(vae, seen, batch)[0].float() * scale, seen_labels),
    }
    with torch.no_grad():
        decoded = torch.cat([vae.decode(part).sample for part in (fixed["held_out"][0] / scale).split(batch)])
        psnr = 10 * math.log10(4 / F.mse_loss(decoded.clamp(-1, 1), to_unit(held_out)).item())
    progress.write(stage="vae done", scaling_factor=scale, held_out_psnr=psnr)

    average, steps = train_transformer(
        model, (means * scale, deviations * scale, labels), fixed, seconds, batch, options.lr, progress, compiled
    )
    save_pipeline(vae, average, names, out / "sample_pipeline")
    save_samples(out / "sample_pipeline", out / "samples.png", device, 2 if options.tiny else 20)
    record = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "resumed": bool(options.resume),
        "seconds": round(progress.seconds(), 1),
        "batch": batch,
        "learning_rate": options.lr,
        "vae_steps": vae_steps,
        "vae_held_out_psnr": round(psnr, 2),
        "transformer_steps": steps,
        "transformer_parameters": sum(p.numel() for p in average.parameters()),
        "vae_parameters": sum(p.numel() for p in vae.parameters()),
        "log": progress.lines,
    }
    (out / "record.json").write_text(json.dumps(record, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", metavar="NPZ", help="only collect the photographs into this file")
    parser.add_argument("--photos", metavar="NPZ", help="train on the photographs in this file")
    parser.add_argument("--folder", help="only cut crops of --photos into this folder, which `finetune` reads")
    parser.add_argument("--crops", type=int, default=40, help="how many of each photograph go into --folder")
    parser.add_argument("--out", default="outputs/sample", help="folder for the result")
    parser.add_argument("--minutes", type=float, default=8.5, help="time for all training, compilation included")
    parser.add_argument("--lr", type=float, default=5e-4, help="highest learning rate of the transformer")
    parser.add_argument("--resume", metavar="FOLDER", help="go on from this pipeline; its VAE stays as it is")
    parser.add_argument("--tiny", action="store_true", help="a model of no use, to see the script run")
    options = parser.parse_args()
    if bool(options.pack) == bool(options.photos):
        parser.error("give one of --pack and --photos")
    if options.pack:
        pack(options.pack)
    elif options.folder:
        write_crops(options.photos, options.folder, options.crops)
    else:
        train(options)


if __name__ == "__main__":
    main()
