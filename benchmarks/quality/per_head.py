"""How much better calibration would be with weights per head: attention error on held-out samples.

python benchmarks/quality/per_head.py --samples 16 --steps 4      # 7 minutes on a CPU

Four numbers per layer: no fit, one fit for all heads (what `calibrate` ships), a fit per head pulled to the identity,
and a fit per head pulled to the shared one; each head's ridges are chosen on held-out samples.
"""

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F

from diffusers_sla import SLAConfig, apply_sla, sla_layers
from diffusers_sla.apply import watch_attention
from diffusers_sla.generation import Request, load_pipeline
from diffusers_sla.training.calibration import branches
from diffusers_sla.training.calls import denoise
from diffusers_sla.training.fit import RIDGES, Moments, error_of, full_precision, solve


class PerHead:
    """Stands in for a layer's attention, as calibration's own watcher does, with sums per head."""

    def __init__(self, heads, head_dim, device):
        self.moments = [[Moments(head_dim, True, device) for _ in range(heads)] for _ in range(2)]
        self.held_out = 0

    def __call__(self, processor, query, key, value, key_mask, kept, run):
        dense = F.scaled_dot_product_attention(query, key, value)
        keywords = {name: run.keywords[name] for name in ("scale", "key_mask", "keep_q", "keep_k")}
        with full_precision():
            o_s, o_l = branches(processor, query, key, value, **keywords)
            for head, moments in enumerate(self.moments[self.held_out]):
                moments.add(*(x[:, head].flatten(0, 1) for x in (o_s, o_l, dense)))
        return dense


def best(fitted, held_out, start, head_dim):
    """The fit, pulled to `start`, whose ridges do best on held-out samples."""
    candidates = [start]
    for ridge_s in RIDGES[:-1]:
        for ridge_l in RIDGES[:-1]:
            candidates.append(solve(fitted, start, head_dim, ridge_s, ridge_l))
    return min(candidates, key=lambda theta: error_of(held_out, theta))


def total_error(parts, thetas):
    """||O - fit|| / ||O|| over all heads."""
    wrong = total = 0.0
    for moments, theta in zip(parts, thetas, strict=True):
        energy = moments.diagonal()[theta.shape[0] :].sum().item()
        wrong += error_of(moments, theta) ** 2 * energy
        total += energy
    return math.sqrt(wrong / total)


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default=str(Path(__file__).parents[2] / "space_app" / "sample_pipeline"))
    parser.add_argument("--samples", type=int, default=16, help="every fourth is held out")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--topk", type=float, default=0.05)
    options = parser.parse_args()
    pipe = load_pipeline(options.pipeline)
    pipe.set_progress_bar_config(disable=True)
    apply_sla(pipe, SLAConfig(topk=options.topk, min_length=0), strict=True)
    layers = sla_layers(pipe)
    model = pipe.transformer.config
    watchers = {
        name: PerHead(model.num_attention_heads, layer.state.head_dim, pipe.device) for name, layer in layers.items()
    }
    labels = list(pipe.labels)
    for i in range(options.samples):
        for watcher in watchers.values():
            watcher.held_out = int(i % 4 == 3)
        request = Request(class_label=labels[i % len(labels)], seed=i, steps=options.steps, guidance_scale=1.0)
        with watch_attention(pipe, watchers):
            denoise(pipe, request)
    sums = [0.0] * 4
    for name, watcher in watchers.items():
        D = layers[name].state.head_dim
        fitted, held_out = ([m.sum.cpu() / m.rows for m in part] for part in watcher.moments)
        identity = torch.zeros(2 * D + 1, D, dtype=torch.float64)
        identity[:D] = torch.eye(D, dtype=torch.float64)
        shared = best(torch.stack(fitted).mean(0), torch.stack(held_out).mean(0), identity, D)
        heads = list(zip(fitted, held_out, strict=True))
        errors = [
            total_error(held_out, [identity] * len(heads)), total_error(held_out, [shared] * len(heads)),
            total_error(held_out, [best(*head, identity, D) for head in heads]),
            total_error(held_out, [best(*head, shared, D) for head in heads]),
        ]  # fmt: skip
        sums = [total + error for total, error in zip(sums, errors, strict=True)]
        print(name, *(f"{error:.3f}" for error in errors), flush=True)
    print("mean: no fit, shared, per head, per head from shared:", *(f"{total / len(layers):.3f}" for total in sums))


if __name__ == "__main__":
    main()
