"""Speed: measured speed-ups against length and sparsity, and a measurement on the hardware of this Space."""

import json
from pathlib import Path

import gradio as gr
import pandas as pd
from serving import HERE, Served, answered, on_gpu

from diffusers_sla import SLAConfig, benchmark
from diffusers_sla.compare import device_name

COLUMNS = ["tokens", "topk", "times faster", "pass", "ms", "dense ms", "shape", "blocks", "machine", "curve"]


def records() -> pd.DataFrame:
    """A row per timed SLA call in the records of `diffusers-sla bench --json` that came with this Space."""
    rows = []
    for folder in (HERE / "benchmarks", HERE.parent / "benchmarks"):
        for path in sorted(folder.glob("*.json")):
            rows += _rows(path)
        if rows:
            break
    return pd.DataFrame(rows, columns=COLUMNS)


def _rows(path: Path) -> list[dict]:
    content = json.loads(path.read_text(encoding="utf-8"))
    rows = []
    for record in content if isinstance(content, list) else []:
        if not isinstance(record, dict) or not {"case", "machine", "rows"} <= record.keys():
            continue
        case, config, machine = record["case"], record["case"]["config"], record["machine"]
        where = str(machine.get("gpu") or machine.get("cpu"))
        for row in record["rows"]:
            if row["name"] == "sla":
                blocks = f"{config['blkq']}x{config['blkk']}"
                shape = f"{case['B']} x {case['H']} heads of {case['D']}"
                rows.append({
                    "tokens": case["L"], "topk": config["topk"], "times faster": round(row["ratio"], 2),
                    "pass": row["what"], "ms": round(row["median"], 3),
                    "dense ms": round(row["median"] * row["ratio"], 3), "shape": shape, "blocks": blocks,
                    "machine": where, "curve": f"topk {config['topk']:g}, {blocks}, {config['linear']}, {shape}",
                })  # fmt: skip
    return rows


def build(served: Served) -> None:
    """Lay out the tab."""
    table = records()
    machines = sorted(table["machine"].unique())
    if machines:
        first = _first(machines)
        with gr.Row():
            machine = gr.Dropdown(machines, value=first, label="Machine")
            which = gr.Radio(sorted(table["pass"].unique(), reverse=True), value="forward", label="Pass")
        missing = gr.Markdown(_missing(table, first, "forward"))
        with gr.Row():
            with gr.Column(min_width=280):
                gr.Markdown("#### Times faster than dense, against the sequence length")
                by_length = gr.LinePlot(
                    _chosen(table, first, "forward"), x="tokens", y="times faster", color="curve", height=300,
                    tooltip="all",
                )  # fmt: skip
            with gr.Column(min_width=280):
                gr.Markdown("#### Times faster than dense, against the share of blocks kept")
                by_topk = gr.LinePlot(
                    _by_topk(table, first, "forward"), x="topk", y="times faster", color="length", height=300,
                    tooltip="all",
                )  # fmt: skip
        rows = gr.Dataframe(
            _chosen(table, first, "forward").drop(columns=["curve", "machine"]), label="The records", wrap=True,
            interactive=False, max_height=300,
        )  # fmt: skip

        def on_choose(machine, which):
            chosen = _chosen(table, machine, which)
            rest = chosen.drop(columns=["curve", "machine"])
            return chosen, _by_topk(table, machine, which), rest, _missing(table, machine, which)

        gr.on(
            [machine.input, which.input], on_choose, [machine, which], [by_length, by_topk, rows, missing],
            api_name="speed", queue=False,
        )  # fmt: skip
        gr.Markdown(
            "Medians of the whole call: choice of blocks, sparse branch, linear branch and projection. Dense is the "
            "fastest of PyTorch's backends, in the same run. Recorded by `diffusers-sla bench --json`."
        )
    else:
        gr.Markdown("No records came with this Space; measure below.")
    gr.Markdown(f"### Measure here\nThis Space runs on **{device_name(served.pipe.device)}**.")
    with gr.Row():
        tokens = gr.Slider(1024, 16384 if served.on_cpu else 65536, 4096, step=1024, label="Tokens")
        topk = gr.Slider(0.02, 1.0, 0.1, step=0.01, label="Blocks computed exactly (topk)")
        measure = gr.Button("Measure", variant="primary", min_width=120)
    measured = gr.Dataframe(
        headers=["attention", "ms", "times faster than dense", "TFLOP/s"], label="Forward, median", interactive=False
    )

    @on_gpu(lambda *inputs: 30)
    def on_measure(tokens, topk):
        if not isinstance(tokens, int | float) or not 64 <= tokens <= 131072:
            raise gr.Error("Tokens must be from 64 to 131072.", print_exception=False)
        return answered(lambda: _measure(served, int(tokens), topk))

    measure.click(
        on_measure, [tokens, topk], measured, api_name="measure", concurrency_id="model", concurrency_limit=1
    )


def _first(machines: list[str]) -> str:
    """The one that the project's own figures are of, where it is among them."""
    return next((name for name in machines if "H200" in name), machines[0])


def _chosen(table: pd.DataFrame, machine: str, which: str) -> pd.DataFrame:
    return table[(table["machine"] == machine) & (table["pass"] == which)].sort_values("tokens")


def _missing(table: pd.DataFrame, machine: str, which: str) -> str:
    return f"No {which} pass was recorded on {machine}." if _chosen(table, machine, which).empty else ""


def _by_topk(table: pd.DataFrame, machine: str, which: str) -> pd.DataFrame:
    chosen = _chosen(table, machine, which).sort_values("topk")
    return chosen.assign(length=chosen["tokens"].astype(str) + " tokens, " + chosen["shape"] + ", " + chosen["blocks"])


def _measure(served: Served, tokens: int, topk: float) -> list[list]:
    on_gpu = not served.on_cpu
    case = benchmark.Case(1, 4, tokens, 64, "bfloat16" if on_gpu else "float32", SLAConfig(topk=topk))
    with served.lock:
        record = benchmark.run(case, served.pipe.device, passes=("forward",), repeats=10 if on_gpu else 3)
    return [[r.name, round(r.median, 3), round(r.ratio or 0, 2), round(r.tflops, 3)] for r in record.rows]
