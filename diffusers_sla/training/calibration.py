"""Fit a pipeline's projections without training it: closed form, no gradients, no data set.

The dense pipeline generates a few samples. Each self-attention call also computes SLA's branches and adds their second
moments to its layer's sums; `fit.py` turns the sums into projections.
"""

import functools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..apply import apply_sla, denoisers, sla_layers, watch_attention
from ..config import SLAConfig
from ..errors import SLAConfigError, SLAUnsupportedError
from ..generation import Request
from ..kernel import select_blocks, sla_attention
from .calls import DenoiserCall, denoise, record_calls
from .fit import LayerFit, Moments, fit_layer, full_precision

OnSample = Callable[[int, int], None]
HELD_OUT_EVERY = 4
CHECKED_STEPS = 3  # of each held-out sample, on which the whole model is compared with itself dense
ROWS_AT_ONCE = 1 << 20  # tokens times heads whose branches are in memory together, in float32


@dataclass
class CalibrationReport:
    """What calibration did. Errors are relative, ||SLA - dense|| / ||dense||, on held-out samples.

    layers: by name, the fit of each layer that ran SLA. output_before, output_after: of the denoiser's own output, on
    a few steps of each held-out sample.
    tokens: rows summed per layer. samples, held_out: generated. seconds: all of it.
    """

    config: SLAConfig
    layers: dict[str, LayerFit]
    output_before: float
    output_after: float
    samples: int
    held_out: int
    steps: int
    tokens: int
    seconds: float
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        layers = {
            name: {
                "error_before": fit.error_before, "error_after": fit.error_after, "error_fitted": fit.error_fitted,
                "ridge_s": fit.ridge_s, "ridge_l": fit.ridge_l,
            }
            for name, fit in self.layers.items()
        }  # fmt: skip
        return {
            "settings": self.config.to_dict(), "layers": layers, "mean_error_before": self.mean("error_before"),
            "mean_error_after": self.mean("error_after"), "output_before": self.output_before,
            "output_after": self.output_after, "samples": self.samples, "held_out": self.held_out,
            "steps": self.steps, "tokens": self.tokens, "seconds": self.seconds, "notes": self.notes,
        }  # fmt: skip

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def mean(self, name: str) -> float:
        """Mean of an error over the layers."""
        return sum(getattr(fit, name) for fit in self.layers.values()) / len(self.layers)

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("layer", "error before", "after", "fitted", "ridge A", "ridge W")]
        for name, fit in self.layers.items():
            ridges = ("kept as it was" if r is None else f"{r:.0e}" for r in (fit.ridge_s, fit.ridge_l))
            errors = (f"{e:.3f}" for e in (fit.error_before, fit.error_after, fit.error_fitted))
            rows.append((name, *errors, *ridges))
        widths = [max(len(row[column]) for row in rows) for column in range(6)]
        table = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        return "\n".join([
            *table,
            f"attention, mean of {len(self.layers)} layers: {self.mean('error_before'):.3f} -> "
            f"{self.mean('error_after'):.3f}; denoiser output: {self.output_before:.4f} -> {self.output_after:.4f}",
            f"{self.samples} samples of {self.steps} steps, {self.held_out} of them held out, "
            f"{self.tokens} rows per layer, {self.seconds:.1f} s",
            *self.notes,
        ])  # fmt: skip


@torch.no_grad()
def calibrate(
    pipe: Any,
    requests: Sequence[Request],
    config: SLAConfig | dict[str, Any] | str | None = None,
    *,
    on_sample: OnSample | None = None,
) -> CalibrationReport:
    """Install SLA on `pipe` with projections fitted to what its dense attention computes; says how well that went.

    Args:
        pipe: A diffusers pipeline. Projections it has are replaced; learnable feature maps stay what they are.
        requests: What to generate, two or more; every fourth, or the last one of fewer, is held out.
        config: Settings to fit for: those installed, or the defaults, when None.
        on_sample: Called with (samples done, samples in all).

    Raises:
        SLAConfigError: Fewer than two requests, or one that does not suit the pipeline.
        SLAUnsupportedError: SLA served no call of any layer.
    """
    if len(requests) < 2:
        raise SLAConfigError(f"calibration needs 2 samples or more, one of them held out, got {len(requests)}")
    started = time.monotonic()
    installed = sla_layers(pipe)
    if config is None and installed:
        config = next(iter(installed.values())).config
    apply_sla(pipe, config, strict=False)
    layers = sla_layers(pipe)
    config = next(iter(layers.values())).config
    for layer in layers.values():
        _reset(layer.state)
    watchers = {name: _Watcher(layer) for name, layer in layers.items()}
    calls: list[DenoiserCall] = []
    step = 0

    def on_step(done):
        nonlocal step
        step = done

    held_out = {i for i in range(len(requests)) if i % HELD_OUT_EVERY == HELD_OUT_EVERY - 1} or {len(requests) - 1}
    for index, request in enumerate(requests):
        total = request.num_steps(pipe)
        checked = {(2 * i + 1) * total // (2 * CHECKED_STEPS) for i in range(CHECKED_STEPS)}
        step = 0
        for watcher in watchers.values():
            watcher.held_out = index in held_out
        wanted = (lambda: step in checked) if index in held_out else (lambda: False)  # noqa: B023
        with watch_attention(pipe, watchers), record_calls(pipe, wanted=wanted, device="cpu") as new:
            denoise(pipe, request, on_step)
        calls += new
        if on_sample:
            on_sample(index + 1, len(requests))
    notes = [
        f"{name}: {watcher.refused} calls ran dense: {', '.join(layers[name].calls_dense)}"
        for name, watcher in watchers.items()
        if watcher.refused
    ]
    before = output_error(pipe, calls)
    fits = {
        name: fit_layer(*watcher.moments)
        for name, watcher in watchers.items()
        if watcher.moments[0].rows and watcher.moments[1].rows
    }
    if not fits:
        raise SLAUnsupportedError(f"SLA served no call of any layer; {notes[0]}")
    for name, fit in fits.items():
        _install(layers[name].state, fit)
    return CalibrationReport(
        config, fits, before, output_error(pipe, calls), len(requests), len(held_out), step,
        max(sum(part.rows for part in watcher.moments) for watcher in watchers.values()),
        time.monotonic() - started, notes,
    )  # fmt: skip


@torch.no_grad()
def output_error(pipe: Any, calls: Sequence[DenoiserCall]) -> float:
    """||SLA - dense|| / ||dense|| of the denoiser's output over recorded calls."""
    models = denoisers(pipe)
    wrong = total = 0.0
    for call in calls:
        dense = call.output.float()
        actual = call.run(models[call.component]).float().cpu()
        wrong += (actual - dense).square().sum().item()
        total += dense.square().sum().item()
    return (wrong / total) ** 0.5


class _Watcher:
    """Stands in for a layer's attention: returns dense attention, and sums what SLA would have made of it."""

    def __init__(self, layer):
        linear = layer.config.linear != "none"
        self.moments = [Moments(layer.state.head_dim, linear, layer.state.place.device) for _ in range(2)]
        self.held_out = False
        self.refused = 0

    def __call__(self, processor, query, key, value, key_mask, kept, run) -> Tensor:
        if not isinstance(run, functools.partial):
            self.refused += 1
            return run()
        keywords = {name: run.keywords[name] for name in ("scale", "key_mask", "keep_q", "keep_k")}
        mask = None if key_mask is None else key_mask[:, None, None]
        gqa = key.shape[1] != query.shape[1]
        dense = F.scaled_dot_product_attention(query, key, value, mask, scale=keywords["scale"], enable_gqa=gqa)
        first, last = kept[0], query.shape[2] - kept[1]
        real = None if key_mask is None else key_mask[:, first:last]
        group = query.shape[1] // key.shape[1]
        heads = max(1, ROWS_AT_ONCE // (query.shape[0] * query.shape[2] * group))

        def rows(x):  # rows of padding are nobody's output
            x = x[:, :, first:last]
            return x.reshape(-1, x.shape[-1]) if real is None else x[real[:, None].expand(x.shape[:3])]

        with full_precision():
            for start in range(0, key.shape[1], heads):
                some, pair = slice(start * group, (start + heads) * group), slice(start, start + heads)
                o_s, o_l = branches(processor, query[:, some], key[:, pair], value[:, pair], **keywords)
                self.moments[self.held_out].add(rows(o_s), None if o_l is None else rows(o_l), rows(dense[:, some]))
        return dense


def branches(processor, query, key, value, **keywords) -> tuple[Tensor, Tensor | None]:
    """O_s and O_l of a layer's settings and feature maps, before A, W and b: float32 [B, H, L, D]; O_l may be None."""
    config, state = processor.config, processor.state
    q, k, v = (x.float() for x in (query, key, value))
    settings = {name: getattr(config, name) for name in ("topk", "blkq", "blkk", "skip")}
    block_map = select_blocks(query, key, **settings, **keywords)
    settings |= keywords | {"block_map": block_map}
    o_s = sla_attention(q, k, v, linear="none", **settings)
    if config.linear == "none":
        return o_s, None
    one = torch.eye(q.shape[-1], device=q.device)
    both = sla_attention(
        q, k, v, linear=config.linear, feature_map=config.feature_map, proj_l_weight=one,
        phi_q_weight=state.phi_q_weight, phi_k_weight=state.phi_k_weight, **settings,
    )  # fmt: skip
    return o_s, both - o_s


def _reset(state) -> None:
    state.proj_s_weight = None
    for weight in (state.proj_l_weight, state.proj_l_bias):
        if weight is not None:
            weight.zero_()


def _install(state, fit: LayerFit) -> None:
    if fit.proj_s is not None:
        state.add_proj_s().copy_(fit.proj_s)
    if fit.proj_l is not None:
        state.proj_l_weight.copy_(fit.proj_l)
        state.proj_l_bias.copy_(fit.bias)
