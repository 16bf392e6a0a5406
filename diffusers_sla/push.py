"""What a push to the Hub consists of: found, checked offline, and committed in one go."""

import json
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .cards import Card, render_card
from .errors import (
    SLAConfigError,
    SLAHubError,
    SLAStateError,
    SLAStateFormatError,
    SLAStateMismatchError,
    SLAStateNotFoundError,
)
from .hub import Files, Pushed, check_repo_id, push_files
from .lora import LORA_NAME
from .saved_models import component_configs, component_names, expected_layers, missing_components
from .state import PT_NAME, SAFETENSORS_NAME, SLAState, read_state, write_state
from .tensor_files import code_in_pickles, open_safetensors
from .weights import fit, parse_settings, save_sla_weights

CONFIG_NAME = "sla_config.json"
_MODEL_FILES = re.compile(r"config\.json|diffusion_pytorch_model.*\.(safetensors|bin|json)")


@dataclass
class PushPlan:
    """What goes to the Hub, by path in the repository, and what of the folder does not."""

    card: Card
    files: dict[str, bytes | Path]
    left_out: list[str]
    readme: str | None = None  # the folder's own
    scratch: Any = field(default=None, repr=False)  # keeps the folder of generated files alive
    rendered: str = field(default="", repr=False)
    unused_readme: bool = False  # the folder has a README.md, and the repository one that came before it

    def size(self, path: str) -> int:
        content = self.files[path]
        return len(content) if isinstance(content, bytes) else content.stat().st_size

    def render(self, remote: str | None = None) -> str:
        """The README.md: what the repository has, or what the folder has, with the card's section in it."""
        self.unused_readme = remote is not None and self.readme is not None
        self.rendered = render_card(self.card, self.readme if remote is None else remote)
        return self.rendered

    @property
    def has_license(self) -> bool:
        """Whether the model card that was rendered last names a licence."""
        return re.search(r"^license:", self.rendered, re.MULTILINE) is not None


def push_sla_to_hub(
    source: Any,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Add Sparse-Linear Attention weights",
    subfolder: str | None = None,
    weights: Sequence[str | os.PathLike] = (),
    base_model: str | None = None,
    license: str | None = None,
    token: str | bool | None = None,
) -> Pushed:
    """Put trained SLA weights on the Hub: state, settings, the weights beside them and a model card, in one commit.

    Everything is checked before the Hub is asked for anything. Repository and branch are made where they are missing;
    content that is there already makes no commit. An existing README.md keeps everything but our section.

    Args:
        source: A folder with a state file, or a model or pipeline with SLA on, of which the state is pushed.
        repo_id: "user/name".
        private: Whether a repository that is made is private; None: the namespace's default.
        revision: Branch, default "main".
        create_pr: Open a pull request instead, which needs no permission to write.
        subfolder: Folder in the repository, for several variants in one; the model card stays at its root.
        weights: More files and folders to push, beside what a folder is known to hold.
        base_model: Repository of the model this was trained from; default: the one the state names.
        license: Licence identifier for the card, such as "apache-2.0".
        token: As in huggingface_hub; by default that of `hf auth login` or HF_TOKEN.

    Raises:
        SLAConfigError: `subfolder` is not a plain path.
        SLAStateError: The state is missing, damaged, or does not fit the weights beside it.
        SLAHubError: A pickle holds code, a link leads out of the folder, `weights` would take the place of another
            file, a part of the pipeline is missing, or the Hub refuses or cannot be reached; see `push_files`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        if not isinstance(source, str | os.PathLike):
            source = save_sla_weights(source, scratch)
        plan = plan_push(source, repo_id, subfolder=subfolder, weights=weights, base_model=base_model, license=license)
        return push_plan(
            plan, private=private, revision=revision, create_pr=create_pr, commit_message=commit_message, token=token
        )


def push_plan(
    plan: PushPlan,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Add Sparse-Linear Attention weights",
    token: str | bool | None = None,
) -> Pushed:
    """Carry out what `plan_push` planned. Arguments and errors as in `push_sla_to_hub`."""

    def files(readme: str | None) -> Files:
        return {**plan.files, "README.md": plan.render(readme).encode()}

    return push_files(
        plan.card.repo_id, files, message=commit_message, private=private, revision=revision, create_pr=create_pr,
        token=token,
    )  # fmt: skip


def plan_push(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    subfolder: str | None = None,
    weights: Sequence[str | os.PathLike] = (),
    base_model: str | None = None,
    license: str | None = None,
) -> PushPlan:
    """Find what to push and check it, offline. Arguments and errors as in `push_sla_to_hub`."""
    folder = Path(folder)
    check_repo_id(repo_id)
    if subfolder is not None and not re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)*", subfolder):
        raise SLAConfigError(f"subfolder must be a path such as 'topk-0.05', got {subfolder!r}")
    if not folder.is_dir():
        raise SLAStateNotFoundError(f"there is no folder {str(folder)!r}")
    state = _checked_state(folder)
    found, kind, component, model_class = _beside(folder)
    _check_links(folder, found)
    for extra in map(Path, weights):
        if not extra.exists():
            raise SLAStateNotFoundError(f"there is no file or folder {str(extra)!r}, given as weights")
        name = Path(os.path.abspath(extra)).name  # "." and ".." have names of their own
        named = _walk(extra, name) if extra.is_dir() else {name: extra.resolve()}
        _check_links(extra, named)
        _check_places(folder, found, named)
        found |= named
    _check_pickles(folder, found)
    _check_whole(found)
    lora = None
    if LORA_NAME in found:
        _check_lora(found[LORA_NAME], state)
        kind = "lora" if kind == "state" else kind
        lora = LORA_NAME if kind != "model" else None  # the card's lines for a model have no pipeline to load it into
    _check_configs(folder, state)

    scratch = tempfile.TemporaryDirectory(prefix="sla-push-")
    for name in (PT_NAME, SAFETENSORS_NAME):
        found[name] = folder / name
        if not found[name].is_file():
            found[name] = Path(scratch.name) / name
            write_state(state, found[name])
    files: dict[str, bytes | Path] = dict(found)
    files[CONFIG_NAME] = _config_json(state)
    prefix = f"{subfolder}/" if subfolder else ""
    card = Card(
        repo_id, state, kind, model_class=model_class, lora=lora, component=component, subfolder=subfolder,
        base_model=base_model, license=license,
    )  # fmt: skip
    readme = folder / "README.md"
    plan = PushPlan(
        card,
        {prefix + name: content for name, content in sorted(files.items())},
        _left_out(folder, found),
        _text(readme) if readme.is_file() else None,
        scratch,
    )
    plan.render()  # a README.md that cannot be merged is refused here, not in the middle of a push
    return plan


def _checked_state(folder: Path) -> SLAState:
    present = [folder / name for name in (SAFETENSORS_NAME, PT_NAME) if (folder / name).is_file()]
    if not present:
        raise SLAStateNotFoundError(
            f"{folder} has no {PT_NAME}: the folder to push is the one that save_sla_weights or the training wrote"
        )
    states = [read_state(path) for path in present]
    if len({state.digest() for state in states}) > 1:
        raise SLAStateMismatchError(
            f"{present[0].name} and {present[1].name} in {folder} hold different states; delete the one that is old"
        )
    state = states[0]
    if state.by_head_dim:
        raise SLAStateFormatError(
            f"{present[0]} is a version 1 file, which says nothing of the layers; "
            f"`diffusers-sla convert {present[0]} NEW.safetensors --model MODEL` gives them"
        )
    try:
        parse_settings(state)
    except SLAStateError as error:
        raise type(error)(f"{present[0]}: {error}") from error
    return state


def _beside(folder: Path) -> tuple[dict[str, Path], Any, str | None, str | None]:
    """(files of the weights in a folder, what they are, the one model's component, its class)."""
    configs = component_configs(folder)
    classes = {name: str(config.get("_class_name")) for name, config in configs.items()}
    if (folder / "model_index.json").is_file():
        found = {"model_index.json": folder / "model_index.json"}
        if missing := missing_components(folder):
            raise SLAHubError(
                f"{folder / 'model_index.json'} names {missing[0]}, and there is no such folder beside it"
            )
        for name in component_names(folder):
            found |= _walk(folder / name, name)
        return found, "pipeline", None, None
    if "" in configs:
        found = {path.name: path for path in folder.iterdir() if path.is_file() and _MODEL_FILES.fullmatch(path.name)}
        return found, "model", "", classes[""]
    found = {}
    for name in configs:
        found |= _walk(folder / name, name)
    if configs:
        return found, "model", next(iter(configs)), classes[next(iter(configs))]
    if (folder / LORA_NAME).is_file():
        return {LORA_NAME: folder / LORA_NAME}, "lora", None, None
    return {}, "state", None, None


def _walk(folder: Path, name: str) -> dict[str, Path]:
    return {
        f"{name}/{path.relative_to(folder).as_posix()}": path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }


def _check_links(folder: Path, found: dict[str, Path]) -> None:
    """That nothing is pushed which a link reaches outside of the folder; the Hub's own cache is made of links."""
    root = folder.resolve()
    cached = root.parent.name == "snapshots"  # files of a repository, or shared by all of them
    allowed = [root, *(root.parents[up] / "blobs" for up in (1, 2) if cached)]
    for path in found.values():
        target = path.resolve()
        if not any(target.is_relative_to(place) for place in allowed):
            raise SLAHubError(f"{path} is a link to {target}, outside of the folder")


def _check_places(folder: Path, found: dict[str, Path], named: dict[str, Path]) -> None:
    """That no file given as weights takes the place of another, or silently loses its own."""
    ours = {name: folder / name for name in ("README.md", CONFIG_NAME, PT_NAME, SAFETENSORS_NAME)}
    for name, path in named.items():
        other = found.get(name) or ours.get(name)
        if other is not None and path.resolve() != other.resolve():
            raise SLAHubError(f"{path}, given as weights, would take the place of {other}; rename it")


def _check_whole(found: dict[str, Path]) -> None:
    """That .safetensors files are as long as they say; what git-lfs leaves in their place is not."""
    for path in found.values():
        if path.suffix == ".safetensors":
            with open_safetensors(path):
                pass


def _text(readme: Path) -> str:
    try:
        return readme.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise SLAHubError(f"{readme} is not text in UTF-8: {error}") from error


def _left_out(folder: Path, found: dict[str, Path]) -> list[str]:
    taken = {name.partition("/")[0] for name in found} | {"README.md", CONFIG_NAME}
    return sorted(path.name for path in folder.iterdir() if path.name not in taken and not path.name.startswith("."))


def _check_pickles(folder: Path, found: dict[str, Path]) -> None:
    for path in sorted({*_walk(folder, "").values(), *found.values()}):
        try:
            code = code_in_pickles(path)
        except Exception as error:
            raise SLAStateFormatError(f"{path} looks like a pickle and is damaged: {error}") from error
        if code:
            raise SLAHubError(f"{path} is a pickle that holds code ({', '.join(code[:3])}); take it out of the folder")


def _check_configs(folder: Path, state: SLAState) -> None:
    settings = parse_settings(state)
    expected = expected_layers(component_configs(folder), settings)
    if not expected:
        return
    try:
        fit(state, expected, settings)
    except SLAStateMismatchError as error:
        raise SLAStateMismatchError(f"{folder / PT_NAME} does not fit the model beside it: {error}") from error


def _check_lora(path: Path, state: SLAState) -> None:
    """That a LoRA and a state are of the same layers, as far as their names and shapes tell."""

    def shape_of(layer: str) -> str:
        return re.sub(r"(?<=\.)\d+(?=\.)", "#", layer)

    # Under dense_layers, and in UNets, layers of the same name may do without SLA.
    every = not parse_settings(state).dense_layers and not any(layer.startswith("unet.") for layer in state.layers)
    patterns = {shape_of(layer) for layer in state.layers}
    with open_safetensors(path) as (_, tensors):
        theirs = {key.partition(".")[0].removesuffix("_2") for key in tensors} & {"transformer", "unet"}
        ours = {layer.partition(".")[0].removesuffix("_2") for layer in state.layers} & {"transformer", "unet"}
        if ours and theirs and not ours & theirs:
            raise SLAStateMismatchError(f"{path} is for a {min(theirs)}, the state beside it for a {min(ours)}")
        for key in tensors:
            module, _, rest = key.partition(".lora")
            layer, _, projection = module.removesuffix(".0").rpartition(".")
            layer = layer.removesuffix(".to_out") if projection == "to_out" else layer
            if shape_of(layer) not in patterns or (layer not in state.layers and not every):
                continue
            if layer not in state.layers:
                raise SLAStateMismatchError(f"{path} has {layer}, and the state beside it has not: they are no pair")
            head_dim = next(iter(state.layers[layer].values())).shape[0]
            width = tensors[key].shape[0] if "_B" in rest and projection == "to_q" else head_dim
            if width % head_dim:
                raise SLAStateMismatchError(f"{path}: {layer} is {width} wide, the state has head size {head_dim}")


def _config_json(state: SLAState) -> bytes:
    content = {
        "format": "diffusers_sla", "version": 2, "settings": state.settings, "layers": sorted(state.layers),
        "digest": state.digest(), "meta": state.meta,
    }  # fmt: skip
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()
