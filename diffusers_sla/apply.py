"""Putting SLA into models and pipelines, taking it out again, and watching it work."""

import contextlib
import difflib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading
from torch import Tensor, nn

from .config import SLAConfig
from .denoising import Denoising, install, remove
from .errors import SLAConfigError, SLAUnsupportedError
from .families import FAMILIES, REFUSED, family_of, is_known, is_self_attention
from .kernel.api import MAX_HEAD_DIM
from .processor import WEIGHTS, BoundSLAAttnProcessor, bind


def denoisers(model_or_pipe: Any) -> dict[str, Any]:
    """The models SLA may go into: a pipeline's by component name, a bare one as "unet" or "transformer".

    Raises:
        SLAUnsupportedError: There is none of a known class; names what there is, and why it is not served.
    """
    models = component_models(model_or_pipe)
    known = {name: part for name, part in models.items() if is_known(part)}
    if not known:
        classes = [type(part).__name__ for part in models.values()]
        refused = next((name for name in classes if name in REFUSED), None)
        if refused:
            raise SLAUnsupportedError(f"SLA has no attention layer to serve in {refused}: {REFUSED[refused]}")
        found = ", ".join(sorted(classes)) or "no model"
        close = [name for part in classes for name in difflib.get_close_matches(part, FAMILIES, n=2)]
        hint = f"; it knows {' and '.join(close)}" if close else ""
        raise SLAUnsupportedError(
            f"SLA knows no attention layer of {found}{hint}. docs/models.md lists the {len(FAMILIES)} model classes "
            "that it serves"
        )
    return known


def component_models(model_or_pipe: Any) -> dict[str, nn.Module]:
    components = getattr(model_or_pipe, "components", None)
    if isinstance(model_or_pipe, nn.Module):
        model = _unwrapped(model_or_pipe)
        components = {"unet" if "UNet" in type(model).__name__ else "transformer": model}
    if not isinstance(components, Mapping):
        raise SLAUnsupportedError(f"a diffusers model or pipeline is needed, got {type(model_or_pipe).__name__}")
    models = {name: _unwrapped(part) for name, part in components.items()}
    return {name: part for name, part in models.items() if isinstance(part, nn.Module)}


def _unwrapped(part: Any) -> Any:
    """The model inside what torch.compile, PEFT's get_peft_model and DDP put around it."""
    while isinstance(part, nn.Module):
        if hasattr(part, "_orig_mod"):
            part = part._orig_mod
        elif hasattr(part, "get_base_model"):
            part = part.get_base_model()  # type: ignore[operator]
        elif isinstance(part, nn.parallel.DistributedDataParallel):
            part = part.module
        else:
            break
    return part


def _family_layers(model: nn.Module) -> dict[str, Any]:
    family = family_of(model)
    return {
        path: attn
        for path, attn in model.named_modules()
        if hasattr(attn, "processor") and is_self_attention(family, path, attn)
    }


def self_attention_layers(
    model_or_pipe: Any, config: SLAConfig | Mapping[str, Any] | str | None = None
) -> dict[str, int]:
    """Head size of every layer that SLA serves under `config`, whether it is installed or not.

    Raises:
        SLAUnsupportedError: No model of a known class, one without such a layer, or a head size over 256.
        SLAConfigError: `dense_layers` names a layer that there is not, or leaves none.
    """
    config = SLAConfig.parse(config)
    layers: dict[str, int] = {}
    named: set[int | str] = set()
    models = denoisers(model_or_pipe)
    for component, model in models.items():
        found = _family_layers(model)
        if not found:
            raise SLAUnsupportedError(f"{type(model).__name__} has no attention layer that SLA can serve")
        for number, (path, attn) in enumerate(found.items()):
            name = f"{component}.{path}"
            ways = [way for way in (number, number - len(found), path, name) if way in config.dense_layers]
            named.update(ways)
            if ways:
                continue
            layers[name] = _head_dim(attn)
            if layers[name] > MAX_HEAD_DIM:
                raise SLAUnsupportedError(f"{name}: head size {layers[name]} is over {MAX_HEAD_DIM}")
    unknown = [entry for entry in config.dense_layers if entry not in named]
    if unknown:
        sizes = ", ".join(f"{name} has {len(_family_layers(model))}" for name, model in models.items())
        raise SLAConfigError(f"dense_layers: there is no layer {unknown[0]!r}; {sizes} that SLA can serve")
    if not layers:
        raise SLAConfigError("dense_layers leaves no layer for SLA")
    return layers


def apply_sla(
    model_or_pipe: Any, config: SLAConfig | Mapping[str, Any] | str | None = None, *, strict: bool | None = None
) -> Any:
    """Give every self-attention layer its own SLA processor, in place; returns what was passed.

    Applied again it takes the new settings and keeps the projections that the layers have, where their shapes allow.

    Args:
        model_or_pipe: A diffusers model, or a pipeline (all of its denoisers). `dense_steps` needs the pipeline: its
            scheduler counts the steps.
        config: Settings; SLAConfig's defaults when None.
        strict: See SLAAttnProcessor.

    Raises:
        SLAUnsupportedError: No model of a known class, or a self-attention layer that cannot be served. Nothing is
            changed then.
        SLAConfigError: A setting is unknown or out of range.
    """
    config = SLAConfig.parse(config)
    wanted = self_attention_layers(model_or_pipe, config)
    pipe = None if isinstance(model_or_pipe, nn.Module) else model_or_pipe
    planned = []
    for component, model in denoisers(model_or_pipe).items():
        family = family_of(model)
        before = model.__dict__.get("_sla_denoising")
        if pipe is None and before is not None and before.pipe is not None:
            denoising = Denoising(family, config, model, before.pipe())
        else:
            denoising = Denoising(family, config, model, pipe)
        processors = []
        for path, attn in _family_layers(model).items():
            old = attn.processor
            native = old.native if isinstance(old, BoundSLAAttnProcessor) else old
            head_dim = wanted.get(f"{component}.{path}")
            if head_dim is None:
                processors.append((attn, native))
                continue
            device = next(attn.parameters()).device
            if device.type == "meta" and any(hasattr(module, "_hf_hook") for module in attn.modules()):
                raise SLAUnsupportedError(
                    f"{component}.{path} is offloaded one layer at a time; call apply_sla before "
                    "enable_sequential_cpu_offload, so that the projections are moved along"
                )
            new = bind(native, head_dim, config, family, denoising, strict=strict, device=device)
            if isinstance(old, BoundSLAAttnProcessor):
                keep_weights(old, new)
            new.train(attn.training)
            processors.append((attn, new))
        planned.append((model, denoising, processors))
    for model, denoising, processors in planned:
        for attn, new in processors:
            set_processor(attn, new)
        install(model, denoising)
        _maybe_remove_and_reapply_group_offloading(model)  # its hooks learn of the projections
    return model_or_pipe


def remove_sla(model_or_pipe: Any) -> Any:
    """Put the native processors back, in place; returns what was passed. The projections are dropped."""
    for model in denoisers(model_or_pipe).values():
        for module in model.modules():
            processor = getattr(module, "processor", None)
            if isinstance(processor, BoundSLAAttnProcessor):
                set_processor(module, processor.native)
        remove(model)
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


@contextlib.contextmanager
def sla_step(model_or_pipe: Any, step: int, num_steps: int) -> Iterator[None]:
    """Say which denoising step the calls inside belong to, for `dense_steps` in a loop of your own.

    Args:
        step: Number of the step, from 0.
        num_steps: How many there are.

    Raises:
        SLAConfigError: There is no such step.
    """
    if not (isinstance(step, int) and isinstance(num_steps, int) and 0 <= step < num_steps):
        raise SLAConfigError(f"step must be a whole number from 0 to num_steps - 1, got {step!r} of {num_steps!r}")
    notes = [model._sla_denoising for model in denoisers(model_or_pipe).values() if hasattr(model, "_sla_denoising")]
    for denoising in notes:
        denoising.step = (step, num_steps)
    try:
        yield
    finally:
        for denoising in notes:
            denoising.step = None


@dataclass
class AttentionRecord:
    """One attention call: query, key, value, output [B, H, L, D]; kept, kept_keys: text tokens at the front and the
    back, of the queries and of the keys (they differ only where the text is among the keys alone)."""

    layer: str
    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    key_mask: Tensor | None
    kept: tuple[int, int]
    kept_keys: tuple[int, int]
    config: SLAConfig


@contextlib.contextmanager
def record(model_or_pipe: Any, layers: list[str] | None = None) -> Iterator[list[AttentionRecord]]:
    """Collect the attention calls of `layers` (all when None), SLA and dense alike, into the list it gives."""
    records: list[AttentionRecord] = []

    def watcher(name):
        def watch(processor, query, key, value, key_mask, kept, run):
            output = run()
            q, k, v, o = (x.detach() for x in (query, key, value, output))
            kept_keys = processor.kept_keys(query, key, kept)
            records.append(AttentionRecord(name, q, k, v, o, key_mask, kept, kept_keys, processor.config))
            return output

        return watch

    with watch_attention(model_or_pipe, {name: watcher(name) for name in layers or sla_layers(model_or_pipe)}):
        yield records


@dataclass
class LayerClock:
    """Seconds and number of a layer's calls; of the last one the shapes of query and key, [B, H, L, D], and the text
    tokens at the front and the back of each."""

    seconds: float = 0.0
    calls: int = 0
    query_shape: tuple[int, ...] = ()
    key_shape: tuple[int, ...] = ()
    kept: tuple[int, int] = (0, 0)
    kept_keys: tuple[int, int] = (0, 0)


@dataclass
class AttentionClock:
    """Time spent in the attention calls of each SLA layer, and of all."""

    layers: dict[str, LayerClock] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return sum(layer.seconds for layer in self.layers.values())

    @property
    def calls(self) -> int:
        return sum(layer.calls for layer in self.layers.values())


@contextlib.contextmanager
def attention_clock(model_or_pipe: Any) -> Iterator[AttentionClock]:
    """Measure the time spent in attention, waiting for the device before and after each call."""
    clock = AttentionClock({name: LayerClock() for name in sla_layers(model_or_pipe)})

    def watcher(layer):
        def watch(processor, query, key, value, key_mask, kept, run):
            _wait(query.device)
            start = time.perf_counter()
            output = run()
            _wait(query.device)
            layer.seconds += time.perf_counter() - start
            layer.calls += 1
            layer.query_shape, layer.key_shape = tuple(query.shape), tuple(key.shape)
            layer.kept, layer.kept_keys = kept, processor.kept_keys(query, key, kept)
            return output

        return watch

    with watch_attention(model_or_pipe, {name: watcher(layer) for name, layer in clock.layers.items()}):
        yield clock


@contextlib.contextmanager
def watch_attention(model_or_pipe: Any, watchers: Mapping[str, Callable[..., Tensor]]) -> Iterator[None]:
    """Call `watch(processor, query, key, value, key_mask, kept, run)` in place of a layer's attention.

    `run()` computes it; what `watch` returns [B, H, L, D] is what the layer goes on with. For a call that SLA serves,
    `run` is a functools.partial with the keywords of `sla_attention` (scale, key_mask, keep_q, keep_k).

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


def _head_dim(attn: Any) -> int:
    for name in ("head_dim", "dim_heads"):
        if isinstance(getattr(attn, name, None), int):
            return getattr(attn, name)
    heads = getattr(attn, "heads", None) or attn.num_heads
    if getattr(attn, "inner_dim", None):
        return attn.inner_dim // heads
    return (attn.to_q if hasattr(attn, "to_q") else attn.to_query).out_features // heads


def set_processor(attn: nn.Module, processor: Any) -> None:
    """Make `processor` the processor of `attn`."""
    # An nn.Module lives in _modules and anything else in __dict__: neither may stay behind under the other.
    attn._modules.pop("processor", None)
    attn.__dict__.pop("processor", None)
    attn.processor = processor


def keep_weights(old: BoundSLAAttnProcessor, new: BoundSLAAttnProcessor) -> None:
    """Copy the projections of one bound processor into another, where their shapes allow."""
    if old.state.proj_s_weight is not None and old.state.head_dim == new.state.head_dim:
        new.state.add_proj_s()
    for name in WEIGHTS:
        weight, kept = getattr(new.state, name), getattr(old.state, name)
        if weight is not None and kept is not None and weight.shape == kept.shape:
            weight.data.copy_(kept.data)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
