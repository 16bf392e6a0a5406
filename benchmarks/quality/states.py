"""What states are worth on the sample pipeline: held-out loss, attention error, how near the images are to dense ones.

    python space_app/train_sample.py --pack photos.npz              # where scikit-image is installed
    python benchmarks/quality/states.py --photos photos.npz space_app/sample_state    # any folders `finetune` wrote

Prints a line of JSON for dense, one for SLA untrained, and one for each folder, whose LoRA is used where it has one.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from measure import attention_error, held_out_loss, images, psnr, ssim

sys.path.insert(0, str(Path(__file__).parents[2] / "space_app"))
import train_sample

from diffusers_sla import apply_sla, load_sla_weights, remove_sla
from diffusers_sla.generation import default_device, load_pipeline
from diffusers_sla.lora import add_lora, lora_beside
from diffusers_sla.state import read_state
from diffusers_sla.weights import parse_settings


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "states", nargs="+", type=Path, metavar="FOLDER", help="the first one's settings serve for all"
    )
    parser.add_argument("--photos", required=True, help="photographs packed by train_sample.py")
    parser.add_argument("--pipeline", default=str(Path(__file__).parents[2] / "space_app" / "sample_pipeline"))
    parser.add_argument("--held-out", type=int, default=8, help="held-out crops per class")
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--images", type=int, default=12, help="images to compare, one per class")
    parser.add_argument("--image-steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=1.0)
    parser.add_argument("--dense-steps", type=int, default=0, help="the first steps of an image, left dense")
    options = parser.parse_args()

    torch.set_float32_matmul_precision("high")
    pipe = load_pipeline(options.pipeline, default_device(), torch.float32)
    pipe.set_progress_bar_config(disable=True)
    model = pipe.transformer.eval()
    blocks = len(pipe.vae.config.block_out_channels)
    train_sample.PIXELS = model.config.sample_size * 2 ** (blocks - 1)
    packed, names = np.load(options.photos), sorted(pipe.labels, key=pipe.labels.get)
    photos = [torch.from_numpy(packed[name]).to(pipe.device).permute(2, 0, 1) for name in names]
    crops, labels = train_sample.crops_of_all(photos, options.held_out, held_out=True, seed=2)
    latents = train_sample.encode(pipe.vae, crops, options.batch)[0].float() * pipe.vae.config.scaling_factor
    class_ids = sorted(pipe.labels.values())[: options.images]

    def loss():
        return held_out_loss(model, train_sample.flow_loss, latents, labels, options.batch)

    def pictures():
        return images(pipe, class_ids, options.image_steps, guidance_scale=options.guidance_scale)[0]

    dense = pictures()
    print(json.dumps({"state": "dense", "loss": round(loss(), 4)}), flush=True)
    config = parse_settings(read_state(options.states[0]))
    config = replace(config, dense_steps=tuple(range(options.dense_steps)))
    few = slice(None, None, max(1, len(latents) // 12))
    for path in [None, *options.states]:
        lora = lora_beside(path)
        if path is None:
            apply_sla(pipe, config)
        else:
            load_sla_weights(pipe, path, config=config, override=True)
        take_out = add_lora(pipe, lora) if lora else None
        shown = pictures()
        values = {
            "loss": loss(),
            "attention_error": attention_error(model, train_sample.flow_loss, latents[few], labels[few]),
            "psnr": psnr(shown, dense),
            "ssim": ssim(shown, dense),
        }
        if take_out:
            take_out()
        remove_sla(pipe)
        rounded = {name: round(value, 4) for name, value in values.items()}
        print(json.dumps({"state": str(path or "untrained"), "lora": lora is not None} | rounded), flush=True)


if __name__ == "__main__":
    main()
