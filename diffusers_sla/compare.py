"""One seed, dense and with SLA at several settings: how long, how much computed, how near."""

import contextlib
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from .apply import apply_sla, attention_clock, remove_sla, sla_disabled, sla_layers
from .config import SLAConfig
from .errors import SLAError
from .flops import blocks_kept, dense_flops, sla_flops
from .generation import Request, generate
from .lora import add_lora
from .weights import load_sla_weights

OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What to run: a name, settings, where the projections come from (None: zero, as before any training), and the
    LoRA that was trained beside them, if one was."""

    name: str
    config: SLAConfig
    state: str | os.PathLike | Mapping[str, Any] | None = None
    lora: str | os.PathLike | None = None

    @contextlib.contextmanager
    def installed(self, pipe: Any) -> Iterator[None]:
        """The pipeline runs this variant inside the block; afterwards it is without SLA, its weights the same bits."""
        remove_sla(pipe)
        with contextlib.ExitStack() as undo:
            undo.callback(remove_sla, pipe)
            if self.state is None:
                apply_sla(pipe, self.config)
            else:
                load_sla_weights(pipe, self.state, config=self.config, override=True)
            if self.lora is not None:
                undo.callback(add_lora(pipe, self.lora))
            yield


@dataclass
class Result:
    """How one variant ran.

    seconds: the whole call. attention_seconds: its self-attention layers; those that the settings leave native are
    taken at their time in the dense run. attention_flops: the same layers.
    exact_share: share of (query block, key block) pairs computed exactly. dense_calls: attention calls that SLA
    could not serve, by reason. psnr [dB] and ssim: against dense, None for dense itself; psnr is infinite where
    the two are the same to the bit.
    """

    name: str
    config: SLAConfig | None
    frames: list[Image.Image]
    seconds: float
    attention_seconds: float
    attention_calls: int
    attention_flops: int
    exact_share: float
    dense_calls: dict[str, int] = field(default_factory=dict)
    psnr: float | None = None
    ssim: float | None = None


@dataclass
class Comparison:
    """Results of one seed, dense first, and where they ran. str() gives a table."""

    results: list[Result]
    steps: int
    device: str
    dtype: str
    torch_version: str

    @property
    def dense(self) -> Result:
        return self.results[0]

    def rows(self) -> list[dict[str, str]]:
        """The table, a dict per variant with the same columns."""
        return [self._row(result) for result in self.results]

    def _row(self, result: Result) -> dict[str, str]:
        dense = self.dense
        saved = 1 - result.attention_flops / dense.attention_flops
        return {
            "": result.name,
            "s/image" if len(dense.frames) == 1 else "s/video": f"{result.seconds:.2f}",
            "s in attention": f"{result.attention_seconds:.2f}",
            "attention speed-up": f"{dense.attention_seconds / result.attention_seconds:.2f}x",
            "blocks exact": f"{result.exact_share:.1%}",
            "attention FLOPs saved": f"{saved:.1%}",
            "PSNR": "-" if result.psnr is None else f"{result.psnr:.1f} dB" if result.psnr < 200 else "identical",
            "SSIM": "-" if result.ssim is None else f"{result.ssim:.3f}",
        }

    def __str__(self) -> str:
        rows = self.rows()
        columns = list(rows[0])
        lines = [columns, *([row[column] for column in columns] for row in rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
        text = [
            "  ".join(
                cell.rjust(width) if i else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        ]
        for result in self.results:
            text += [f"{result.name}: {count} calls ran dense: {why}" for why, count in result.dense_calls.items()]
        return "\n".join(text)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the frames, as plain values that JSON has; an infinite psnr is the text "identical"."""
        results = [{key: value for key, value in asdict(r).items() if key != "frames"} for r in self.results]
        for result in results:
            if result["psnr"] == float("inf"):
                result["psnr"] = "identical"
        return {
            "device": self.device, "dtype": self.dtype, "torch": self.torch_version, "steps": self.steps,
            "results": results,
        }  # fmt: skip


def compare(
    pipe: Any,
    request: Request,
    variants: Sequence[Variant],
    *,
    warm_up: bool = True,
    on_progress: OnProgress | None = None,
) -> Comparison:
    """Generate the same request dense and with each variant.

    Args:
        pipe: A diffusers pipeline without SLA; it is left so.
        variants: What to compare with dense.
        warm_up: Run a step of each, not measured, before it is timed: allocation, kernel compilation.
        on_progress: Called with (name, steps done, steps in all) after each step. What it raises ends the comparison.

    Raises:
        SLAError: SLA is installed already.
        SLAConfigError, SLAUnsupportedError, SLAStateError: See `Request`, `apply_sla`, `load_sla_weights`, `add_lora`.
    """
    if sla_layers(pipe):
        raise SLAError("compare() needs a pipeline without SLA: remove_sla(pipe) first")
    request.arguments(pipe)
    results: list[Result] = []
    try:
        apply_sla(pipe)  # for the clock; every layer runs its native attention
        with sla_disabled(pipe):
            generation, dense_clock = _timed(pipe, request, "dense", warm_up, on_progress)
        results.append(_result("dense", None, pipe, generation, dense_clock, dense_clock))
    finally:
        remove_sla(pipe)
    for variant in variants:
        with variant.installed(pipe):
            generation, clock = _timed(pipe, request, variant.name, warm_up, on_progress)
            result = _result(variant.name, variant.config, pipe, generation, clock, dense_clock)
        result.psnr = psnr(results[0].frames, result.frames)
        result.ssim = ssim(results[0].frames, result.frames)
        results.append(result)
    return Comparison(
        results, request.num_steps(pipe), device_name(pipe.device), str(pipe.dtype).removeprefix("torch."),
        torch.__version__,
    )  # fmt: skip


def _result(name, config, pipe, generation, clock, dense_clock) -> Result:
    installed = sla_layers(pipe)
    seconds, flops, exact, pairs = 0.0, 0, 0, 0
    dense_calls: dict[str, int] = {}
    for layer, in_dense in dense_clock.layers.items():
        seen = clock.layers.get(layer, in_dense)
        if not seen.calls:
            continue
        seconds += seen.seconds
        B, H, Lq, D = seen.query_shape
        Lk, text_keys = seen.key_shape[2], sum(seen.kept_keys)
        settings = config or SLAConfig()
        blocks = -(-(Lk - text_keys) // settings.blkk)
        calls_sla, calls_dense = 0, seen.calls
        if layer in installed:
            calls_sla, calls_dense = installed[layer].calls_sla, sum(installed[layer].calls_dense.values())
            for why, count in installed[layer].calls_dense.items():
                if why != "disabled":
                    dense_calls[why] = dense_calls.get(why, 0) + count
        has_proj_s = calls_sla and installed[layer].state.proj_s_weight is not None
        flops += calls_dense * dense_flops(B, H, Lq, Lk, D)
        flops += calls_sla * sla_flops(
            settings, B, H, Lq, Lk, D, sum(seen.kept), text_keys, proj_s=bool(has_proj_s)
        )  # fmt: skip
        exact += calls_sla * blocks_kept(settings, blocks) + calls_dense * blocks
        pairs += seen.calls * blocks
    return Result(
        name, config, generation.frames, generation.seconds, seconds, clock.calls, flops, exact / pairs, dense_calls
    )


def _timed(pipe, request, name, warm_up, on_progress):
    if warm_up:
        config = next(iter(sla_layers(pipe).values())).config
        generate(pipe, replace(request, steps=_steps_to_warm_up(config)))
        for layer in sla_layers(pipe).values():  # count what is measured, and nothing else
            layer.calls_sla = 0
            layer.calls_dense.clear()
    with attention_clock(pipe) as clock:
        generation = generate(
            pipe, request, on_step=lambda done, total: on_progress(name, done, total) if on_progress else None
        )
    return generation, clock


def _steps_to_warm_up(config: SLAConfig) -> int:
    """The fewest steps of which one runs SLA."""
    steps = 1
    while {step if step >= 0 else steps + step for step in config.dense_steps} >= set(range(steps)):
        steps += 1
    return steps


def psnr(expected: list[Image.Image], actual: list[Image.Image]) -> float:
    """Peak signal-to-noise ratio over all frames, in dB; infinite where they are the same."""
    a, b = np.stack([np.asarray(f) for f in expected]), np.stack([np.asarray(f) for f in actual])
    return float("inf") if np.array_equal(a, b) else float(peak_signal_noise_ratio(a, b, data_range=255))


def ssim(expected: list[Image.Image], actual: list[Image.Image]) -> float:
    """Structural similarity, in colour, mean over the frames."""
    pairs = zip(expected, actual, strict=True)
    values = [structural_similarity(np.asarray(a), np.asarray(b), channel_axis=-1, data_range=255) for a, b in pairs]
    return float(np.mean(values))


def device_name(device: torch.device) -> str:
    """What the device is called: a GPU by its name, a CPU with its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
    return device.type
