"""Write docs/models.md from the table in diffusers_sla/families.py: `python docs/models.py`."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

from models import MODELS, make  # noqa: E402

from diffusers_sla.families import FAMILIES, REFUSED, Family  # noqa: E402

TEXT = """# Models

Written by `python docs/models.py` from the table in
[families.py](../diffusers_sla/families.py); change that, not this page.

`apply_sla(pipe)` serves {served} model classes of Diffusers {version}, and leaves {refused} alone, with the reason
below. `sla_report(pipe)` gives the same verdicts for a pipeline at hand.

- **Layers**: paths of the layers that run SLA. All others - cross-attention, text refiners - stay native.
- **Text**: where the text tokens sit in the sequence. They are never approximated: text queries attend to everything,
  every query attends to all text keys, and blocks are cut on the image tokens alone. "keys" says that the text is
  among the keys only. In a batch with texts of several lengths the longest counts.
- **Masks**: what the layer reads besides boolean masks [B, 1, 1, L] that hide keys. "product": [B, 1, L, L] made of
  one such mask. "bias": numbers added to the scores, zero for keys that are there. Hidden keys are never selected,
  pooled, summed or attended to. Every other mask makes a call run dense, and `sla_report` says so.
- **Swept**: the tiny models of tests/models on which the class is tested: with every block kept and a zero projection
  it equals the native model; each call equals the definition; gradients are the definition's; the layers and calls
  counted are the ones in this table; what the table calls text is what changes with the text.

## Served

| model | layers | text | masks | swept | note |
| --- | --- | --- | --- | --- | --- |
{rows}

## Left alone

| model | because |
| --- | --- |
{refusals}

## To add a model

1. Find the paths of its self-attention layers: `[n for n, m in model.named_modules() if hasattr(m, "processor")]`.
2. Read its blocks: which end of the sequence is text, who joins text and image (the processor, or the block or model
   before it: then the row needs `image_tokens`), which masks there are.
3. Add a row to `FAMILIES`, and a tiny model with inputs to tests/models. The sweep in tests/test_families.py does the
   rest: it fails where the row is wrong about the layers, the calls or the text.
4. Run `python docs/models.py`.
"""


def page() -> str:
    import diffusers

    tiny: dict[str, list[str]] = {}
    for name in MODELS:
        tiny.setdefault(type(make(name)[0]).__name__, []).append(name)
    rows = [_row(name, family, tiny.get(name, [])) for name, family in sorted(FAMILIES.items())]
    refusals = [f"| {name} | {reason} |" for name, reason in sorted(REFUSED.items())]
    return TEXT.format(
        served=len(rows), refused=len(refusals), version=".".join(diffusers.__version__.split(".")[:2]),
        rows="\n".join(rows), refusals="\n".join(refusals),
    )  # fmt: skip


def _row(name: str, family: Family, tiny: list[str]) -> str:
    layers = (
        family.layers.strip("^$").replace(r"(^|\.)", "").replace(r"\.", ".").replace(r"\d+", "*").replace("|", "\\|")
    )
    layers = layers.removeprefix(".").replace(r"\w+", "*")
    layers = f"`{layers}`" + (f" unless `{family.unless}`" if family.unless else "")
    text = (family.text or "-") + (", keys" if family.extra_keys else "")
    if family.text_if_masked:
        text += f" ({family.text_if_masked} if masked)"
    return f"| {name} | {layers} | {text} | {family.mask or '-'} | {', '.join(tiny) or '-'} | {family.note} |"


if __name__ == "__main__":
    (HERE / "models.md").write_text(page())
