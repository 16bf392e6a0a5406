"""`diffusers-sla bench`: time one or several shapes against dense attention."""

import json
from pathlib import Path

import click
import torch

from .. import benchmark
from ..config import SLAConfig
from ..errors import SLAConfigError
from ..generation import check_device, check_suffix
from ..kernel.api import MAX_HEAD_DIM
from .options import check_extra

HEADINGS = ("B,H,L,D", "topk", "blocks", "linear", "dtype", "pass", "which", "ms", "20%", "80%", "x dense", "graph ms", "x dense", "TFLOP/s", "of floor", "MiB", "launches")  # fmt: skip  # noqa: E501
WIDTHS = (18, 5, 7, 8, 8, 8, 15, 9, 9, 9, 7, 9, 7, 7, 8, 7, 8)

PLOT_SUFFIXES = (".png", ".jpg", ".pdf", ".svg")


def _shape(_context, _parameter, values):
    shapes = []
    for value in values:
        parts = value.split(",")
        if len(parts) != 4 or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
            raise click.BadParameter(f"{value!r} is not B,H,L,D: four positive numbers such as 1,12,32760,128")
        shapes.append(tuple(int(part) for part in parts))
    return shapes


@click.command()
@click.option("--shape", "shapes", multiple=True, callback=_shape, metavar="B,H,L,D", help="Repeat for several.")
@click.option("--topk", "topks", type=float, multiple=True, help="Share of key blocks kept; repeat for several.")
@click.option(
    "--sla-config", "--sla_config", "settings", help='Settings as JSON: \'{"blkq": 128, "linear": "marginal"}\'.'
)
@click.option("--dtype", "dtypes", type=click.Choice(["bfloat16", "float16", "float32"]), multiple=True)
@click.option("--pass", "passes", type=click.Choice(benchmark.PASSES), multiple=True, help="Default: both.")
@click.option("--device", default=None, help="cuda or cpu; cuda where there is a GPU.")
@click.option("--flex", is_flag=True, help="Also FlexAttention over the same blocks.")
@click.option("--proj-s", is_flag=True, help="Also the projection of the sparse branch.")
@click.option("--repeats", default=None, type=click.IntRange(1), help="Timed calls of each.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Also write the records.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Also draw the speed-ups: .png, .svg.")
def command(shapes, topks, settings, dtypes, passes, device, flex, proj_s, repeats, json_path, plot):
    """Time attention: dense, SLA, and FlexAttention if asked for, in one process on random inputs.

    \b
    Examples:
      diffusers-sla bench --device cpu --shape 1,4,8192,128 --topk 0.05 --pass forward
      diffusers-sla bench --shape 1,12,32760,128 --topk 0.05 --sla-config '{"blkq": 128}' --json wan.json
    """
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name.partition(":")[0] not in ("cuda", "cpu"):
        raise SLAConfigError(f"--device must be cuda or cpu, got {name!r}")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise click.BadParameter("this torch sees no GPU; --device cpu times the plain torch path")
    check_device(name)
    device = torch.device(name)
    passes = passes or benchmark.PASSES
    if flex and device.type == "cpu" and "backward" in passes:
        raise SLAConfigError("--flex: FlexAttention has no backward on a CPU; give --pass forward")
    for option, path in (("--json", json_path), ("--plot", plot)):
        if path and not path.parent.is_dir():
            raise SLAConfigError(f"{option} {path}: there is no folder {path.parent}")
    if plot:
        check_suffix(plot, PLOT_SUFFIXES, "a plot")
        check_extra("--plot", "demo", "matplotlib")
    for shape in shapes:
        if shape[3] > MAX_HEAD_DIM:
            raise SLAConfigError(f"--shape: the head size D must be at most {MAX_HEAD_DIM}, got {shape[3]}")
    base = SLAConfig.parse(settings).to_dict()
    cases = [
        benchmark.Case(B, H, L, D, dtype, SLAConfig.parse(base | {"topk": topk}), proj_s)
        for B, H, L, D in shapes or [(1, 4, 4096, 128)]
        for dtype in dtypes or ["bfloat16"]
        for topk in topks or [base["topk"]]
    ]
    measured = {case.dtype: benchmark.rates(case.dtype, device) for case in cases}
    click.echo(_line(HEADINGS), err=True)
    records = []
    for case in cases:
        record = benchmark.run(
            case, device, passes=passes, flex=flex, measured=measured[case.dtype],
            repeats=repeats or (30 if device.type == "cuda" else 5),
        )  # fmt: skip
        records.append(record)
        for row in record.rows:
            click.echo(_line(_cells(case, row)))
    if json_path:
        json_path.write_text(json.dumps([record.to_dict() for record in records], indent=1) + "\n")
    if plot:
        _plot(records, plot)


def _cells(case, row):
    config = case.config
    return (
        f"{case.B},{case.H},{case.L},{case.D}", f"{config.topk:g}", f"{config.blkq}x{config.blkk}", config.linear,
        case.dtype, row.what, row.name, f"{row.median:.3f}", f"{row.p20:.3f}", f"{row.p80:.3f}", f"{row.ratio:.2f}",
        "" if row.graph is None else f"{row.graph:.3f}", "" if row.graph_ratio is None else f"{row.graph_ratio:.2f}",
        f"{row.tflops:.2f}", f"{row.floor_share:.0%}", "" if row.memory_mib is None else f"{row.memory_mib:.0f}",
        "" if row.launches is None else str(row.launches),
    )  # fmt: skip


def _line(cells):
    return " ".join(cell.rjust(width) for cell, width in zip(cells, WIDTHS, strict=True))


def _value(record, key):
    return record.case["config"]["topk"] if key == "topk" else record.case[key]


def _plot(records, path):
    """Speed-up of SLA over the best dense attention, on a GPU both as CUDA graphs: against L and against topk, where
    several of them were timed."""
    from matplotlib.figure import Figure

    varied = {key for key in ("L", "topk", "B", "dtype") if len({_value(record, key) for record in records}) > 1}
    panels = [("L", "sequence length"), ("topk", "share of key blocks kept (topk)")]
    axes_of = [panel for panel in panels if panel[0] in varied] or panels[:1]
    graphs = all(row.graph_ratio for record in records for row in record.rows if row.name == "sla")
    figure = Figure(figsize=(5.5 * max(len(axes_of), 1.3), 4), layout="constrained")
    for place, (key, label) in enumerate(axes_of):
        axes = figure.add_subplot(1, len(axes_of), place + 1)
        curves: dict[tuple[str, str], list[tuple[float, float]]] = {}
        for record in records:
            case, config = record.case, record.case["config"]
            fixed = f"topk {config['topk']:g}" if key == "L" else f"L {case['L']}"
            name = f"{fixed}, {case['H']} x {case['D']}, {config['blkq']}x{config['blkk']}"
            name += f", B {case['B']}" * ("B" in varied) + f", {case['dtype']}" * ("dtype" in varied)
            for row in record.rows:
                if row.name == "sla":
                    point = (_value(record, key), row.graph_ratio if graphs else row.ratio)
                    curves.setdefault((name, row.what), []).append(point)
        colors = {name: f"C{i}" for i, name in enumerate(dict.fromkeys(name for name, _ in curves))}
        for (name, what), points in curves.items():
            line = "-" if what == "forward" else "--"
            axes.plot(
                *zip(*sorted(points), strict=True), line, color=colors[name], marker="o", label=f"{what}, {name}"
            )
        axes.axhline(1, color="gray", linewidth=0.8)
        axes.set(xlabel=label, ylim=(0, None))
        axes.set_ylabel("times faster than the best dense attention" + "\n(both as CUDA graphs)" * graphs)
        if key == "L":
            axes.set_xscale("log", base=2)
        ticks = sorted({x for points in curves.values() for x, _ in points})
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axes.minorticks_off()
        axes.legend(fontsize="x-small")
    figure.savefig(path, dpi=150)
