"""sla_report: what ran SLA, what ran dense, and why; as an object, a table and JSON. Its picture: pictures.py."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from .apply import component_models, self_attention_layers
from .families import REFUSED, family_of, is_known, is_self_attention
from .processor import BoundSLAAttnProcessor


@dataclass
class LayerReport:
    """How a layer ran: `runs` is "sla" or "native", with `why` for the latter; dense calls by reason; whether its
    projections are frozen.

    Calls inside compiled graphs count 0.
    """

    runs: str
    why: str = ""
    calls_sla: int = 0
    calls_dense: dict[str, int] = field(default_factory=dict)
    frozen: bool = False


@dataclass
class SLAReport:
    """What `sla_report` found: a verdict on each model that has attention layers of Diffusers (on each model there is,
    where none has), and each of their attention layers. str() gives a table."""

    models: dict[str, str]
    layers: dict[str, LayerReport]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        rows = [("layer", "runs", "SLA calls", "dense calls")]
        for name, layer in self.layers.items():
            dense = "; ".join(f"{count} ({reason})" for reason, count in layer.calls_dense.items()) or "0"
            runs = f"{layer.runs}, frozen" if layer.frozen else layer.runs
            rows.append((name, runs, str(layer.calls_sla), dense if layer.runs == "sla" else f"- ({layer.why})"))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        table = [] if len(rows) == 1 else ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        return "\n".join([f"{name}: {verdict}" for name, verdict in self.models.items()] + table)


def sla_report(model_or_pipe: Any) -> SLAReport:
    """Which attention layers run SLA, how many calls they served, how many ran dense, and why.

    Raises:
        SLAUnsupportedError: What was passed is neither a model nor a pipeline.
    """
    models, layers = {}, {}
    there = component_models(model_or_pipe)
    for component, model in there.items():
        attentions = {
            path: module
            for path, module in model.named_modules()
            if callable(getattr(module, "processor", None)) and not isinstance(module.processor, type)
        }
        verdict = _verdict(model, len(attentions))
        if verdict is None:
            continue
        models[component] = verdict
        if not is_known(model):
            continue
        family = family_of(model)
        bound = [a.processor for a in attentions.values() if isinstance(a.processor, BoundSLAAttnProcessor)]
        if bound and not any(p.calls_sla or p.calls_dense for p in bound) and _is_compiled(model_or_pipe, component):
            models[component] += "; compiled: calls inside its graphs are not counted"
        wanted = {name.partition(".")[2] for name in self_attention_layers(model, bound[0].config)} if bound else None
        for path, attn in attentions.items():
            processor = attn.processor
            if isinstance(processor, BoundSLAAttnProcessor):
                frozen = not any(p.requires_grad for p in processor.state.parameters())
                report = LayerReport("sla", "", processor.calls_sla, dict(processor.calls_dense), frozen)
            elif not is_self_attention(family, path, attn):
                report = LayerReport("native", "not self-attention over the image")
            elif "_sla_denoising" not in model.__dict__:
                report = LayerReport("native", "SLA is not installed")
            elif wanted is not None and path not in wanted:
                report = LayerReport("native", "dense_layers")
            else:  # by hand, or by `set_attn_processor` of the model
                report = LayerReport("native", f"{type(processor).__name__} was set in SLA's place: apply SLA again")
            layers[f"{component}.{path}"] = report
    if not models:
        models = {name: f"{type(model).__name__}: nothing for SLA to serve" for name, model in there.items()}
    return SLAReport(models, layers)


def _is_compiled(model_or_pipe: Any, component: str) -> bool:
    """Whether torch.compile was called on the model or on parts of it."""
    part = model_or_pipe if isinstance(model_or_pipe, nn.Module) else model_or_pipe.components[component]
    return any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in part.modules())


def _verdict(model: nn.Module, num_attentions: int) -> str | None:
    """One line on a model, or None for one that has nothing to do with attention of Diffusers."""
    name = type(model).__name__
    denoising = model.__dict__.get("_sla_denoising")
    if is_known(model):
        if denoising is not None and denoising.unknown:
            return f"{name}: served; dense_steps had no effect in {denoising.unknown} forwards, nobody gave the step"
        return f"{name}: served"
    refused = next((base.__name__ for base in type(model).__mro__ if base.__name__ in REFUSED), None)
    if refused:
        return f"{name}: runs natively: {REFUSED[refused]}"
    if num_attentions and not name.startswith(("Autoencoder", "Asymmetric", "VQ", "ConsistencyDecoder")):
        return (
            f"{name}: unknown to this version of diffusers_sla, all of its {num_attentions} attention layers run "
            "natively; docs/models.md says how to add a model"
        )
    return None
