"""The quality table: what each kind of attention costs in quality, before and after the same fine-tuning.

    python space_app/train_sample.py --pack photos.npz              # where scikit-image is installed
    python benchmarks/quality/run.py --photos photos.npz --out quality --minutes 9     # on a GPU, as often as it takes
    python benchmarks/quality/report.py quality                     # table.md, quality.json, quality.png

A cell of the table is one row, stage and seed; `results.jsonl` in --out gets a line for each, and what is there is not
done again, so the command can be cut off and repeated until it says that nothing is left. Stages: "before" any
training, "calibrated", "tuned" (fine-tuned from zero projections), "both". Every row is fine-tuned for the same number
of steps from the same backbone on the same batches, full attention included. `states/` gets the projections of seed 0;
with --train projection they go with the backbone as it was.
"""

import argparse
import contextlib
import copy
import json
import platform
import sys
import time
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import DiTPipeline
from measure import attention_error, held_out_loss, images, psnr, ssim, wait
from rows import DENSE, ROWS, install, trains_projection

sys.path.insert(0, str(Path(__file__).parents[2] / "space_app"))
import train_sample

from diffusers_sla import save_sla_weights, sla_layers, sla_parameters
from diffusers_sla.generation import Request
from diffusers_sla.training import calibrate

STAGES = ("before", "calibrated", "tuned", "both")


class Bench:
    def __init__(self, options):
        self.options = options
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.set_float32_matmul_precision("high")
        self.pipe = DiTPipeline.from_pretrained(options.pipeline, dtype=torch.float32).to(self.device)
        self.pipe.set_progress_bar_config(disable=True)
        # In training mode DiT drops class labels by itself.
        self.model = self.pipe.transformer.eval()
        self.backbone = copy.deepcopy(self.model.state_dict())
        blocks = len(self.pipe.vae.config.block_out_channels)
        train_sample.PIXELS = self.model.config.sample_size * 2 ** (blocks - 1)
        packed = np.load(options.photos)
        names = sorted(self.pipe.labels, key=self.pipe.labels.get)
        photos = [torch.from_numpy(packed[name]).to(self.device).permute(2, 0, 1) for name in names]
        scale = self.pipe.vae.config.scaling_factor
        self.sets = {}
        wanted = {"train": (options.crops, False, 1), "held_out": (options.held_out, True, 2)}
        for name, (count, held_out, seed) in wanted.items():
            crops, labels = train_sample.crops_of_all(photos, count, held_out, seed)
            means, deviations = train_sample.encode(self.pipe.vae, crops, 32)
            self.sets[name] = (means.float() * scale, deviations.float() * scale, labels)
        self.class_ids = sorted(self.pipe.labels.values())[: options.images]
        self.dense_images = None
        self.calibrations = {}

    def fresh(self, row):
        """The backbone as it was, with the row's attention."""
        install(self.model, row)
        self.model.load_state_dict(self.backbone)
        self.model.requires_grad_(True)

    def calibrate(self, row):
        """The row's fit: made once, then copied in."""
        if row.name not in self.calibrations:
            labels = sorted(self.pipe.labels, key=self.pipe.labels.get)
            requests = [
                Request(
                    class_label=labels[i % len(labels)],
                    seed=i,
                    steps=self.options.calibration_steps,
                    guidance_scale=1.0,
                )
                for i in range(self.options.calibration_samples)
            ]
            report = calibrate(self.pipe, requests, row.config)
            states = {n: copy.deepcopy(layer.state.state_dict()) for n, layer in sla_layers(self.model).items()}
            self.calibrations[row.name] = (states, report.seconds)
        states, seconds = self.calibrations[row.name]
        for name, layer in sla_layers(self.model).items():
            if "proj_s_weight" in states[name]:
                layer.state.add_proj_s()
            layer.state.load_state_dict(states[name])
            layer.strict = True
        return seconds

    def tune(self, row, seed):
        """The same batches for every row; losses of the last tenth, and seconds per step."""
        options = self.options
        projections = sla_parameters(self.model) if row.kind != DENSE else []
        for parameter in projections:
            parameter.requires_grad_(trains_projection(row))
        ours = {id(p) for p in projections}
        backbone = [p for p in self.model.parameters() if id(p) not in ours]
        for parameter in backbone:
            parameter.requires_grad_(options.train == "full")
        groups = [{"params": backbone, "lr": options.lr}] if options.train == "full" else []
        if projections and trains_projection(row):
            groups.append({"params": projections, "lr": options.projection_lr})
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.01)
        warm = max(1, options.steps // 10)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1, (step + 1) / warm) * (1 - 0.9 * step / options.steps)
        )
        means, deviations, labels = self.sets["train"]
        generator = torch.Generator().manual_seed(seed)
        losses, curve, started = [], [], None
        for step in range(options.steps):
            if step == min(5, options.steps - 1):
                wait(self.device)
                started = time.monotonic()
            index = torch.randint(len(means), (options.batch,), generator=generator).to(self.device)
            drawn = torch.randn((2, options.batch, *means.shape[1:]), generator=generator).to(self.device)
            latents = means[index] + deviations[index] * drawn[0]
            sigma = torch.randn(options.batch, generator=generator).sigmoid()
            shift = train_sample.SHIFT
            sigma = (shift * sigma / (1 + (shift - 1) * sigma)).clamp(0.001, 0.999).to(self.device)
            loss = train_sample.flow_loss(self.model, latents, drawn[1], sigma, labels[index])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
            if (step + 1) % max(1, options.steps // 6) == 0:
                curve.append((step + 1, self.loss()))
        wait(self.device)
        timed = max(1, options.steps - min(5, options.steps - 1))
        last = torch.stack(losses[-max(1, options.steps // 10) :]).mean().item()
        return {"train_loss": last, "seconds_per_step": (time.monotonic() - started) / timed, "curve": curve}

    def loss(self):
        means, _, labels = self.sets["held_out"]
        return held_out_loss(self.model, train_sample.flow_loss, means, labels, self.options.batch)

    def cell(self, row, stage, seed):
        """Everything that is measured of one cell."""
        started = time.monotonic()
        self.fresh(row)
        values = {}
        if stage in ("calibrated", "both"):
            values["calibration_seconds"] = self.calibrate(row)
        if stage in ("tuned", "both"):
            values |= self.tune(row, seed)
        if self.dense_images is None:
            with self._dense_backbone():
                self.dense_images = images(self.pipe, self.class_ids, self.options.image_steps)[0]
        pixels, seconds = images(self.pipe, self.class_ids, self.options.image_steps)
        means, _, labels = (x[:: max(1, len(x) // 12)] for x in self.sets["held_out"])
        return values | {
            "loss": self.loss(),
            "attention_error": attention_error(self.model, train_sample.flow_loss, means, labels),
            "psnr": psnr(pixels, self.dense_images),
            "ssim": ssim(pixels, self.dense_images),
            "seconds_per_image": seconds / len(pixels),
            "seconds": time.monotonic() - started,
        }

    @contextlib.contextmanager
    def _dense_backbone(self):
        """The pipeline has the backbone as it was, dense, for the pictures that all others are compared with."""
        ours = self.pipe.transformer
        other = type(ours).from_config(ours.config).to(self.device).eval()
        other.load_state_dict(self.backbone)
        self.pipe.transformer = other
        try:
            yield
        finally:
            self.pipe.transformer = ours


def cells(options):
    """Row, stage, seed: all rows of a seed before the next seed; nothing is trained in "before" and "calibrated"."""
    for seed in range(options.seeds):
        for row in ROWS:
            if options.rows and row.name not in options.rows:
                continue
            for stage in STAGES:
                if stage in ("calibrated", "both") and not row.fits:
                    continue
                if stage in ("before", "calibrated") and seed:
                    continue
                if stage in ("tuned", "both") and options.train == "projection" and not trains_projection(row):
                    continue
                yield row, stage, seed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", required=True, help="photographs packed by train_sample.py")
    parser.add_argument("--pipeline", default=str(Path(__file__).parents[2] / "space_app" / "sample_pipeline"))
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--minutes", type=float, default=9, help="stop before a cell that would end later than this")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", nargs="*", help="names of rows; all when left out")
    parser.add_argument("--train", choices=("full", "projection"), default="full", help="what fine-tuning trains")
    parser.add_argument("--steps", type=int, default=300, help="of fine-tuning")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--projection-lr", type=float, default=2e-3)
    parser.add_argument("--crops", type=int, default=512, help="training crops per class")
    parser.add_argument("--held-out", type=int, default=8, help="held-out crops per class")
    parser.add_argument("--images", type=int, default=12, help="images to compare, one per class")
    parser.add_argument("--image-steps", type=int, default=20)
    parser.add_argument("--calibration-samples", type=int, default=24)
    parser.add_argument("--calibration-steps", type=int, default=10)
    options = parser.parse_args()
    started = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "results.jsonl"
    settings = {n: getattr(options, n) for n in (
        "steps", "batch", "lr", "projection_lr", "crops", "held_out", "images", "image_steps", "calibration_samples",
        "calibration_steps", "train",
    )}  # fmt: skip
    file.touch()
    done = [json.loads(line) for line in file.read_text().splitlines()]
    for line in done:
        if line["settings"] != settings:
            sys.exit(f"{file} is of other settings: {line['settings']}; use another --out")
    have = {(line["row"], line["stage"], line["seed"]) for line in done}
    left = [cell for cell in cells(options) if (cell[0].name, *cell[1:]) not in have]
    if left:
        bench = Bench(options)
        where = torch.cuda.get_device_name() if bench.device.type == "cuda" else platform.processor() or "cpu"
    while left:
        row, stage, seed = left.pop(0)
        alike = [line["seconds"] for line in done if (line["device"], line["stage"]) == (where, stage)]
        if time.monotonic() - started + 1.2 * max(alike, default=0.0) > options.minutes * 60:
            left.insert(0, (row, stage, seed))
            break
        line = {"row": row.name, "stage": stage, "seed": seed} | bench.cell(row, stage, seed)
        line |= {
            "settings": settings, "device": where, "torch": torch.__version__, "diffusers": diffusers.__version__,
        }  # fmt: skip
        if row.config is not None and seed == 0:
            save_sla_weights(bench.pipe, options.out / "states" / f"{row.name}, {stage}")
        with file.open("a") as out:
            out.write(json.dumps(line) + "\n")
        done.append(line)
        shown = {key: round(line[key], 4) for key in ("loss", "attention_error", "psnr", "ssim", "seconds")}
        print(f"{row.name}, {stage}, seed {seed}: {shown}", flush=True)
    print(f"{len(left)} cells are left" if left else "nothing is left")


if __name__ == "__main__":
    main()
