"""The rows of the quality table: what attention each runs, and which of its weights are trained."""

from dataclasses import dataclass

import torch

from diffusers_sla import SLAConfig, apply_sla, remove_sla, sla_layers

DENSE, SPARSE, LINEAR, SUM, SLA = "dense", "sparse", "linear", "sum", "sla"


@dataclass(frozen=True)
class Row:
    """kind: "dense"; "sparse", without a linear branch; "linear", that alone; "sum" of both, no projection; "sla"."""

    name: str
    kind: str
    config: SLAConfig | None = None

    @property
    def fits(self) -> bool:
        """Whether calibration has something to fit."""
        return self.kind in (SPARSE, SLA)


def _row(name, kind, topk=0.05, **settings):
    return Row(name, kind, SLAConfig(topk=topk, min_length=0, **settings))


# The most telling first: a run that is cut off has them.
ROWS = [
    Row("full attention", DENSE),
    _row("SLA all", SLA),
    _row("sparse only", SPARSE, linear="none"),
    _row("SLA marginal", SLA, linear="marginal"),
    _row("L+S, no projection", SUM),
    _row("linear only", LINEAR),
    _row("SLA marginal, skip 0.10", SLA, linear="marginal", skip=0.10),
    _row("sparse only, topk 0.15", SPARSE, topk=0.15, linear="none"),
    _row("SLA all, topk 0.1", SLA, topk=0.1),
    _row("SLA all, topk 0.2", SLA, topk=0.2),
    _row("SLA all, elu", SLA, feature_map="elu"),
    _row("SLA all, hedgehog", SLA, feature_map="hedgehog"),
]


def install(model, row: Row) -> None:
    """Put a row's attention, and nothing else, on a model; projections as they are before any training."""
    remove_sla(model)
    if row.config is None:
        return
    apply_sla(model, row.config, strict=True)
    for layer in sla_layers(model).values():
        if row.kind == SUM:
            with torch.no_grad():
                layer.state.proj_l_weight.copy_(torch.eye(layer.state.head_dim))
        if row.kind == LINEAR:
            with torch.no_grad():  # as nothing else carries the output
                layer.state.proj_l_weight.copy_(torch.eye(layer.state.head_dim))
            layer.watch = linear_only


def trains_projection(row: Row) -> bool:
    return row.kind not in (DENSE, SUM)


def linear_only(processor, query, key, value, key_mask, kept, run):
    """Linear attention over all keys (eq. 1 with phi = softmax) and its projection, in place of SLA."""
    state = processor.state
    with torch.autocast(query.device.type, enabled=False):
        q, k, v = (x.float() for x in (query, key, value))
        q, k = q.softmax(-1), k.softmax(-1)
        o = (q @ (k.mT @ v)) / (q @ k.sum(2)[..., None] + 1e-5)
        return (o @ state.proj_l_weight.T + state.proj_l_bias).to(query.dtype)
