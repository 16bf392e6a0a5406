"""Model cards: what `diffusers-sla push` writes into README.md, from the state file's own records."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jinja2
from huggingface_hub import ModelCard, ModelCardData

from .config import SLAConfig
from .errors import SLAHubError
from .state import SLAState

# Packed next to this file in a wheel, at the root of the repository in a checkout.
_PACKED = Path(__file__).parent / "model_card_templates"
TEMPLATES = _PACKED if _PACKED.is_dir() else Path(__file__).parent.parent / "model_card_templates"
TAGS = ("diffusers-sla", "sparse-linear-attention", "sparse-attention")
# The Hub's name of what models do -> what their classes are called; those of anything else make images.
_TASKS = {"text-to-video": "3D|Video|Motion|Temporal|I2V", "text-to-audio": "Audio|Music|AceStep"}
# Denoisers of which no pipeline of Diffusers 0.42 has `load_lora_weights`.
_NO_LORA_LOADER = {
    "AllegroTransformer3DModel", "AudioLDM2UNet2DConditionModel", "BriaTransformer2DModel",
    "CogView3PlusTransformer2DModel", "Cosmos3OmniTransformer", "DiTTransformer2DModel", "DreamLiteUNetModel",
    "EasyAnimateTransformer3DModel", "GlmImageTransformer2DModel", "HunyuanDiT2DModel",
    "HunyuanImageTransformer2DModel", "HunyuanVideo15Transformer3DModel", "I2VGenXLUNet",
    "JoyImageEditPlusTransformer3DModel", "JoyImageEditTransformer3DModel", "Kandinsky6SRTransformer3DModel",
    "Kandinsky6Transformer3DModel", "LatteTransformer3DModel", "LongCatAudioDiTTransformer",
    "LongCatImageTransformer2DModel", "LuminaNextDiT2DModel", "MotifVideoTransformer3DModel",
    "NucleusMoEImageTransformer2DModel", "OmniGenTransformer2DModel", "OvisImageTransformer2DModel",
    "PixArtTransformer2DModel", "SanaWMTransformer3DModel", "StableAudio3DiTModel", "StableAudioDiTModel",
    "Transformer2DModel", "UNet2DModel", "UNetSpatioTemporalConditionModel", "UVit2DModel",
}  # fmt: skip
# What a record in the state file's meta is called in the card; each is a list of rows, dicts with the same keys.
TABLES = {"speed": "Speed", "quality": "Quality"}


@dataclass
class Card:
    """What a card says beyond the state: kind is what lies beside it, loaded by `component` if it is one model."""

    repo_id: str
    state: SLAState
    kind: Literal["state", "lora", "model", "pipeline"]
    model_class: str | None = None
    lora: str | None = None
    component: str | None = None
    subfolder: str | None = None
    base_model: str | None = None
    license: str | None = None
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def base(self) -> str | None:
        return self.base_model or self.state.meta.get("base_model")


def render_card(card: Card, existing: str | None = None) -> str:
    """The README.md: `existing` with our section put in place, or a new one.

    What somebody wrote stays: text outside of the section between the two markers, and values in the front matter.

    Raises:
        SLAHubError: The front matter of `existing` is not valid.
    """
    mark = f"diffusers-sla {card.subfolder}" if card.subfolder else "diffusers-sla"
    begin, end = f"<!-- {mark}: begin -->", f"<!-- {mark}: end -->"
    section = f"{begin}\n\n{_section(card)}\n\n{end}"
    if existing is None:
        title = card.repo_id.partition("/")[2] or card.repo_id
        return f"---\n{_front_matter(card, {})}\n---\n\n# {title}\n\n{section}\n"
    try:
        # The client warns where there is no front matter; that is nothing wrong here.
        old = ModelCard(existing if existing.lstrip().startswith("---") else f"---\n\n---\n{existing}")
    except Exception as error:  # the client passes on whatever its YAML parser raises
        raise SLAHubError(f"the front matter of the README.md that is there is not valid: {error}") from error
    text = old.text.strip("\n")
    pattern = re.compile(re.escape(begin) + r".*?" + re.escape(end), re.DOTALL)
    text = pattern.sub(lambda _: section, text) if pattern.search(text) else f"{text}\n\n{section}".strip("\n")
    return f"---\n{_front_matter(card, old.data.to_dict())}\n---\n\n{text}\n"


def render(template: str, **values: Any) -> str:
    """A template of model_card_templates/, filled in."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=False)
    environment.filters |= {"cell": _cell, "table": _table}
    return environment.from_string((TEMPLATES / template).read_text(encoding="utf-8")).render(values)


def _front_matter(card: Card, old: dict[str, Any]) -> str:
    classes = " ".join(_classes(card))
    ours: dict[str, Any] = {
        "library_name": "diffusers",
        "pipeline_tag": next((tag for tag, named in _TASKS.items() if re.search(named, classes)), "text-to-image"),
        "inference": False,
    }
    if card.base:
        ours["base_model"] = card.base
        ours["base_model_relation"] = "adapter" if card.kind in ("state", "lora") else "finetune"
    if card.license:
        ours["license"] = card.license
    tags = [*(old.get("tags") or []), *TAGS, *(["lora"] if card.kind == "lora" else [])]
    merged = ours | {name: value for name, value in old.items() if value is not None}
    if card.license:  # asked for now; what stands there may be a default of the Hub's form
        merged["license"] = card.license
    return ModelCardData(**merged | {"tags": list(dict.fromkeys(tags))}).to_yaml().strip()


def _classes(card: Card) -> list[str]:
    """The classes of the denoisers, as far as the card knows them."""
    models = card.state.meta.get("models")
    classes = [*models.values()] if isinstance(models, dict) else []
    return [str(name) for name in (*classes, card.model_class) if name]


def _section(card: Card) -> str:
    meta, settings = card.state.meta, SLAConfig.parse(card.state.settings).to_dict()
    settings = {name: value for name, value in settings.items() if value not in (None, [])}
    where = f', subfolder="{card.subfolder}"' if card.subfolder else ""
    if card.kind == "model":
        loader, variable = card.model_class or "AutoModel", "model"
        part = "/".join(name for name in (card.subfolder, card.component) if name)
        inside = f', subfolder="{part}"' if part else ""
        load = f'model = {loader}.from_pretrained("{card.repo_id}"{inside}, torch_dtype=torch.bfloat16).to("cuda")'
    else:
        loader, variable = "DiffusionPipeline", "pipe"
        source = card.repo_id if card.kind == "pipeline" else card.base or "the base model"
        load = f'pipe = DiffusionPipeline.from_pretrained("{source}", torch_dtype=torch.bfloat16).to("cuda")'
    tables = [(title, rows) for name, title in TABLES.items() if (rows := _rows(meta.get(name)))]
    training = meta.get("training")
    base = card.base
    return render(
        "state.md",
        kind=card.kind, repo_id=card.repo_id, loader=loader, load=load, variable=variable, lora=card.lora,
        lora_loader=_NO_LORA_LOADER.isdisjoint(_classes(card)),
        base=f"[{base}](https://huggingface.co/{base})" if base else None, subfolder_argument=where,
        settings=settings, percent=f"{100 * settings['topk']:g}%", layers=len(card.state.layers),
        head_dims=" and ".join(map(str, sorted({_head_dim(tensors) for tensors in card.state.layers.values()}))),
        tables=tables, training=training if isinstance(training, dict) else None,
        without_sla="without SLA" in str(meta.get("quality")), digest=card.state.digest(),
        versions=meta.get("versions") if isinstance(meta.get("versions"), dict) else None,
    ).strip()  # fmt: skip


def _head_dim(tensors: Mapping[str, Any]) -> int:
    return next(iter(tensors.values())).shape[0]


def _rows(value: Any) -> list[dict[str, Any]]:
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{_cell(name)} {_cell(inner)}" for name, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_cell, value))
    return " ".join(str(value).split()).replace("|", r"\|").replace("<", "&lt;")


def _table(rows: Iterable[Mapping[str, Any]]) -> str:
    rows = list(rows)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns), *([row.get(name, "") for name in columns] for row in rows)]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)
