"""Putting SLA into models and pipelines, taking it out again, and reporting what ran."""

import contextlib
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .config import SLAConfig
from .errors import SLAUnsupportedError
from .families import FAMILIES, family_of, is_known, is_self_attention
from .kernel.api import MAX_HEAD_DIM
from .processor import WEIGHTS, BoundSLAAttnProcessor, bind


def denoisers(model_or_pipe: Any) -> dict[str, Any]:
    """The models SLA may go into: a pipeline's by component name, a bare one as "unet" or "transformer".

    Raises:
        SLAUnsupportedError: There is none of a known class; names what there is.
    """
    components = getattr(model_or_pipe, "components", None)
    if isinstance(model_or_pipe, nn.Module):
        model = getattr(model_or_pipe, "_orig_mod", model_or_pipe)
        components = {"unet" if type(model).__name__.startswith("UNet") else "transformer": model}
    if not isinstance(components, Mapping):
        raise SLAUnsupportedError(f"a diffusers model or pipeline is needed, got {type(model_or_pipe).__name__}")
    models = {name: getattr(part, "_orig_mod", part) for name, part in components.items()}
    models = {name: part for name, part in models.items() if isinstance(part, nn.Module)}
    known = {name: part for name, part in models.items() if is_known(part)}
    if not known:
        classes = ", ".join(sorted(type(part).__name__ for part in models.values())) or "no model"
        raise SLAUnsupportedError(f"SLA knows no attention layer of {classes}; it knows {', '.join(FAMILIES)}")
    return known


def self_attention_layers(model_or_pipe: Any) -> dict[str, int]:
    """Head size of every layer that SLA serves, whether it is installed or not.

    Raises:
        SLAUnsupportedError: No model of a known class, one without such a layer, or a head size over 256.
    """
    layers: dict[str, int] = {}
    for component, model in denoisers(model_or_pipe).items():
        family = family_of(model)
        found = {
            f"{component}.{path}": _head_dim(attn)
            for path, attn in model.named_modules()
            if hasattr(attn, "processor") and is_self_attention(family, path, attn)
        }
        if not found:
            raise SLAUnsupportedError(f"{type(model).__name__} has no attention layer that SLA can serve")
        for name, head_dim in found.items():
            if head_dim > MAX_HEAD_DIM:
                raise SLAUnsupportedError(f"{name}: head size {head_dim} is over {MAX_HEAD_DIM}")
        layers |= found
    return layers


def apply_sla(
    model_or_pipe: Any, config: SLAConfig | Mapping[str, Any] | str | None = None, *, strict: bool | None = None
) -> Any:
    """Give every self-attention layer its own SLA processor, in place; returns what was passed.

    Applied again it takes the new settings and keeps the projections that the layers have, where their shapes allow.

    Args:
        model_or_pipe: A diffusers model, or a pipeline (all of its denoisers).
        config: Settings; SLAConfig's defaults when None.
        strict: See SLAAttnProcessor.

    Raises:
        SLAUnsupportedError: No model of a known class, or a self-attention layer that cannot be served. Nothing is
            changed then.
        SLAConfigError: A setting is unknown or out of range.
    """
    config = SLAConfig.parse(config)
    planned = []
    models = denoisers(model_or_pipe)
    for name, head_dim in self_attention_layers(model_or_pipe).items():
        component, _, path = name.partition(".")
        model = models[component]
        attn = model.get_submodule(path)
        family = family_of(model)
        old = attn.processor
        native = old.native if isinstance(old, BoundSLAAttnProcessor) else old
        device = next(attn.parameters()).device
        new = bind(native, head_dim, config, strict=strict, text=family.text, device=device)
        if isinstance(old, BoundSLAAttnProcessor):
            _keep_weights(old, new)
        joined = family.joined and re.search(family.joined, path)
        planned.append((attn, new, model.get_submodule(path.rpartition(".")[0]) if joined else None))
    for attn, new, block in planned:
        _set_processor(attn, new)
        new.train(attn.training)
        if block is not None and not hasattr(block, "_sla_text_hook"):
            block._sla_text_hook = block.register_forward_pre_hook(_note_text_length, with_kwargs=True)
    return model_or_pipe


def remove_sla(model_or_pipe: Any) -> Any:
    """Put the native processors back, in place; returns what was passed. The projections are dropped."""
    for model in denoisers(model_or_pipe).values():
        for module in model.modules():
            processor = getattr(module, "processor", None)
            if isinstance(processor, BoundSLAAttnProcessor):
                _set_processor(module, processor.native)
            if hasattr(module, "_sla_text_hook"):
                module._sla_text_hook.remove()
                del module._sla_text_hook
    return model_or_pipe


def sla_layers(model_or_pipe: Any) -> dict[str, BoundSLAAttnProcessor]:
    """The bound processors by layer, such as "transformer.blocks.0.attn1"; empty where SLA is not installed."""
    return {
        f"{component}.{path}": module.processor
        for component, model in denoisers(model_or_pipe).items()
        for path, module in model.named_modules()
        if isinstance(getattr(module, "processor", None), BoundSLAAttnProcessor)
    }


def sla_parameters(model_or_pipe: Any) -> list[nn.Parameter]:
    """Every trainable weight of SLA, each once: what an optimizer's own parameter group takes."""
    found = {id(p): p for layer in sla_layers(model_or_pipe).values() for p in layer.state.parameters()}
    return list(found.values())


@contextlib.contextmanager
def sla_disabled(model_or_pipe: Any) -> Iterator[None]:
    """Run every SLA layer dense inside the block; such calls count as dense, reason "disabled"."""
    layers = list(sla_layers(model_or_pipe).values())
    before = [layer.enabled for layer in layers]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


@dataclass
class AttentionRecord:
    """One attention call: query, key, value, output [B, H, L, D]; kept: text tokens at the front and the back."""

    layer: str
    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    key_mask: Tensor | None
    kept: tuple[int, int]
    config: SLAConfig


@contextlib.contextmanager
def record(model_or_pipe: Any, layers: list[str] | None = None) -> Iterator[list[AttentionRecord]]:
    """Collect the attention calls of `layers` (all when None), SLA and dense alike, into the list it gives."""
    records: list[AttentionRecord] = []

    def watcher(name):
        def watch(processor, query, key, value, key_mask, kept, run):
            output = run()
            q, k, v, o = (x.detach() for x in (query, key, value, output))
            records.append(AttentionRecord(name, q, k, v, o, key_mask, kept, processor.config))
            return output

        return watch

    with watch_attention(model_or_pipe, {name: watcher(name) for name in layers or sla_layers(model_or_pipe)}):
        yield records


@dataclass
class AttentionClock:
    """Seconds spent in the attention calls of SLA layers, how many calls there were, and the last one of each layer.

    shapes: layer -> query's shape [B, H, Lq, D], key's shape, and the text tokens at the front and the back.
    """

    seconds: float = 0.0
    calls: int = 0
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, int]]] = field(default_factory=dict)


@contextlib.contextmanager
def attention_clock(model_or_pipe: Any) -> Iterator[AttentionClock]:
    """Measure the time spent in attention, waiting for the device before and after each call."""
    clock = AttentionClock()

    def watcher(name):
        def watch(processor, query, key, value, key_mask, kept, run):
            _wait(query.device)
            start = time.perf_counter()
            output = run()
            _wait(query.device)
            clock.seconds += time.perf_counter() - start
            clock.calls += 1
            clock.shapes[name] = (tuple(query.shape), tuple(key.shape), kept)
            return output

        return watch

    with watch_attention(model_or_pipe, {name: watcher(name) for name in sla_layers(model_or_pipe)}):
        yield clock


@contextlib.contextmanager
def watch_attention(model_or_pipe: Any, watchers: Mapping[str, Callable[..., Tensor]]) -> Iterator[None]:
    """Call `watch(processor, query, key, value, key_mask, kept, run)` in place of a layer's attention.

    `run()` computes it; what `watch` returns [B, H, L, D] is what the layer goes on with.

    Args:
        watchers: Layer, as `sla_layers` names it -> watch. A layer has one at a time: an inner block's.

    Raises:
        SLAUnsupportedError: No such layer has SLA.
    """
    layers = sla_layers(model_or_pipe)
    unknown = [name for name in watchers if name not in layers]
    if unknown:
        raise SLAUnsupportedError(f"{unknown[0]!r} is no SLA layer; there are {', '.join(layers) or 'none'}")
    before = {name: layers[name].watch for name in watchers}
    for name, watch in watchers.items():
        layers[name].watch = watch
    try:
        yield
    finally:
        for name, watch_before in before.items():
            layers[name].watch = watch_before


@dataclass
class LayerReport:
    """How a layer ran: `runs` is "sla" or "native"; dense calls by reason. Calls inside compiled graphs count 0."""

    runs: str
    calls_sla: int = 0
    calls_dense: dict[str, int] = field(default_factory=dict)


@dataclass
class SLAReport:
    """What `sla_report` found, layer by layer. str() gives a table."""

    layers: dict[str, LayerReport]

    def to_dict(self) -> dict[str, Any]:
        return {name: vars(layer) for name, layer in self.layers.items()}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        rows = [("layer", "runs", "SLA calls", "dense calls")]
        for name, layer in self.layers.items():
            dense = "; ".join(f"{count} ({reason})" for reason, count in layer.calls_dense.items()) or "0"
            rows.append((name, layer.runs, str(layer.calls_sla), dense if layer.runs == "sla" else "-"))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def sla_report(model_or_pipe: Any) -> SLAReport:
    """Which attention layers run SLA, how many calls they served, how many ran dense, and why."""
    layers = {}
    for component, model in denoisers(model_or_pipe).items():
        for path, module in model.named_modules():
            processor = getattr(module, "processor", None)
            if processor is None or not callable(processor):
                continue
            if isinstance(processor, BoundSLAAttnProcessor):
                report = LayerReport("sla", processor.calls_sla, dict(processor.calls_dense))
            else:
                report = LayerReport("native")
            layers[f"{component}.{path}"] = report
    return SLAReport(layers)


def _head_dim(attn: Any) -> int:
    heads = getattr(attn, "heads", None) or getattr(attn, "num_heads", None)
    return (getattr(attn, "inner_dim", None) and attn.inner_dim // heads) or attn.to_q.out_features // heads


def _set_processor(attn: nn.Module, processor: Any) -> None:
    # An nn.Module lives in _modules and anything else in __dict__: neither may stay behind under the other.
    attn._modules.pop("processor", None)
    attn.__dict__.pop("processor", None)
    attn.processor = processor


def _keep_weights(old: BoundSLAAttnProcessor, new: BoundSLAAttnProcessor) -> None:
    if old.state.proj_s_weight is not None and old.state.head_dim == new.state.head_dim:
        new.state.add_proj_s()
    for name in WEIGHTS:
        weight, kept = getattr(new.state, name), getattr(old.state, name)
        if weight is not None and kept is not None and weight.shape == kept.shape:
            weight.data.copy_(kept.data)


def _note_text_length(block, args, kwargs):
    text = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
    block.attn.processor.text_length = None if text is None else text.shape[1]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
