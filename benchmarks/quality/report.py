"""From results.jsonl of run.py: the table as Markdown, its numbers as JSON, and the plot.

python benchmarks/quality/report.py quality
"""

import json
import statistics
import sys
from pathlib import Path

import matplotlib
from rows import ROWS

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STAGES = ("before", "calibrated", "tuned", "both")
COLUMNS = (
    ("loss", "held-out loss", 4),
    ("attention_error", "attention error", 3),
    ("psnr", "PSNR to dense, dB", 1),
    ("ssim", "SSIM to dense", 3),
    ("seconds_per_step", "s/step", 3),
    ("seconds_per_image", "s/image", 3),
)


def summarize(lines):
    """{row: {stage: {column: (mean, standard deviation or None, seeds)}}} in the order of the table."""
    table = {}
    for row in ROWS:
        for stage in STAGES:
            cells = [line for line in lines if (line["row"], line["stage"]) == (row.name, stage)]
            if cells:
                table.setdefault(row.name, {})[stage] = {
                    key: _spread([cell[key] for cell in cells if key in cell]) for key, *_ in COLUMNS
                }
    return table


def _spread(values):
    if not values:
        return None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values)


def markdown(table):
    header = ["attention", "stage", *(title for _, title, _ in COLUMNS)]
    rows = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for name, stages in table.items():
        for stage, columns in stages.items():
            cells = [_cell(columns[key], digits) for key, _, digits in COLUMNS]
            rows.append("| " + " | ".join([name, stage, *cells]) + " |")
    return "\n".join(rows) + "\n"


def _cell(value, digits):
    if value is None:
        return "-"
    mean, deviation, _ = value
    return f"{mean:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")


def plot(table, lines, path):
    """Left: by how much each row's held-out loss is above that of full attention. Right: how the loss fell."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 0.5 * len(table) + 2.5), layout="constrained")
    colours = {"before": "#bbbbbb", "calibrated": "#e0a030", "tuned": "#4477aa", "both": "#228833"}
    names = list(table)
    dense = table["full attention"]["tuned"]["loss"][0]
    rows = [name for name in names if name != "full attention"]
    for stage, colour in colours.items():
        points = [(table[name][stage]["loss"], y) for y, name in enumerate(rows) if stage in table[name]]
        left.errorbar(
            [value[0] - dense for value, _ in points], [y for _, y in points],
            xerr=[value[1] or 0 for value, _ in points], fmt="o", color=colour, label=stage,
        )  # fmt: skip
    left.set_xscale("log")
    left.set_yticks(range(len(rows)), rows)
    left.invert_yaxis()
    left.set_xlabel("held-out loss above full attention's, tuned")
    left.legend()
    for name in names:
        for stage, style in (("tuned", "-"), ("both", "--")):
            curves = [line["curve"] for line in lines if line["row"] == name and line["stage"] == stage]
            if curves and name in ("full attention", "SLA all", "SLA marginal", "sparse only"):
                steps = [step for step, _ in curves[0]]
                means = [statistics.fmean(curve[i][1] for curve in curves) for i in range(len(steps))]
                colour = f"C{names.index(name)}"
                label = f"{name}{', calibrated first' if stage == 'both' else ''}"
                right.plot(steps, means, style, color=colour, label=label)
    right.set_xlabel("fine-tuning steps")
    right.set_ylabel("held-out loss")
    if right.lines:
        right.legend()
    figure.savefig(path, dpi=150)


def main():
    folder = Path(sys.argv[1])
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    table = summarize(lines)
    text = markdown(table)
    machines = sorted({f"{line['device']}, torch {line['torch']}, diffusers {line['diffusers']}" for line in lines})
    text += f"\n{'; '.join(machines)}; settings {json.dumps(lines[0]['settings'])}\n"
    (folder / "table.md").write_text(text)
    summary = {"machines": machines, "settings": lines[0]["settings"], "rows": table}
    (folder / "quality.json").write_text(json.dumps(summary, indent=1) + "\n")
    plot(table, lines, folder / "quality.png")
    print(text)


if __name__ == "__main__":
    main()
