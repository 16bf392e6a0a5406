"""sla_report as a picture: the block map of each layer that ran SLA, the share it keeps, what ran dense, and why."""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .apply import AttentionRecord
from .kernel import select_blocks
from .report import LayerReport, SLAReport

if TYPE_CHECKING:
    from PIL import Image

COLUMNS = 5
WIDTH = 40  # characters of a panel's title


def report_picture(report: SLAReport, records: Sequence[AttentionRecord] = ()) -> "Image.Image":
    """One panel per layer that ran SLA: for each query block (row) how many of the heads keep a key block (column).

    Args:
        report: What `sla_report` gives.
        records: Calls collected by `with record(pipe) as records:`, for the block maps; the last one of a layer
            counts. A layer without one gets no map.

    Raises:
        ImportError: matplotlib is missing; it comes with `pip install diffusers-sla[demo]`.
    """
    from matplotlib.figure import Figure

    from .pictures import render, wrapped

    last = {r.layer: r for r in records}
    layers = [(name, layer) for name, layer in report.layers.items() if layer.runs == "sla"]
    columns = max(2, min(COLUMNS, len(layers)))
    rows = max(1, -(-len(layers) // columns))
    lines = _summary(report)
    figure = Figure(figsize=(3 * columns, 3.4 * rows + 0.2 * len(lines) + 0.4), dpi=80, layout="constrained")
    halves = figure.add_gridspec(2, 1, height_ratios=[3.4 * rows, 0.2 * len(lines) + 0.4])
    grid, text = (figure.add_subfigure(halves[half]) for half in range(2))
    panels = grid.subplots(rows, columns, squeeze=False).flatten()
    for panel in panels:
        panel.axis("off")
    for panel, (name, layer) in zip(panels, layers, strict=False):
        title = [wrapped(name.removeprefix("transformer."), WIDTH), _calls(layer)]
        if name in last:
            share, heads = kept_share(last[name]), block_shares(last[name])
            panel.imshow(heads.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
            title.insert(1, f"{share:.0%} of the scores kept")
        panel.set_title("\n".join(title), fontsize=7)
    text.text(0.01, 0.98, "\n".join(lines), fontsize=8, va="top", family="monospace")
    return render(figure)


def block_shares(r: AttentionRecord) -> Tensor:
    """[num_q_blocks, num_k_blocks]: the share of heads and samples for which the block is critical."""
    return (_block_map(r) == 1).float().mean((0, 1)).cpu()


def kept_share(r: AttentionRecord) -> float:
    """The share of query-key pairs that are computed exactly, text included."""
    Lq, Lk = r.query.shape[2], r.key.shape[2]
    rows, columns = (_sizes(L - sum(kept), block) for L, kept, block in (
        (Lq, r.kept, r.config.blkq), (Lk, r.kept_keys, r.config.blkk),
    ))  # fmt: skip
    critical = (_block_map(r) == 1).float().mean((0, 1)).cpu()
    image = rows @ critical @ columns
    return float((image + Lq * Lk - rows.sum() * columns.sum()) / (Lq * Lk))


def _block_map(r: AttentionRecord) -> Tensor:
    config = r.config
    return select_blocks(
        r.query, r.key, topk=config.topk, blkq=config.blkq, blkk=config.blkk, skip=config.skip,
        key_mask=r.key_mask, keep_q=r.kept, keep_k=r.kept_keys,
    )  # fmt: skip


def _sizes(length: int, block: int) -> Tensor:
    sizes = torch.full((-(-length // block),), float(block))
    sizes[-1] -= -length % block
    return sizes


def _calls(layer: LayerReport) -> str:
    dense = ",\n".join(
        textwrap.fill(f"{count} dense ({reason})", WIDTH) for reason, count in layer.calls_dense.items()
    )
    return f"{layer.calls_sla} {'call' if layer.calls_sla == 1 else 'calls'} SLA" + (f"\n{dense}" if dense else "")


def _summary(report: SLAReport) -> list[str]:
    native: dict[str, int] = {}
    for layer in report.layers.values():
        if layer.runs == "native":
            native[layer.why] = native.get(layer.why, 0) + 1
    verdicts = [f"{name}: {verdict}" for name, verdict in report.models.items()]
    return verdicts + [f"{count} {'layer' if count == 1 else 'layers'} native: {why}" for why, count in native.items()]
