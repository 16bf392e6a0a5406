"""Imports go one way; docs/architecture.md shows the graph."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "diffusers_sla"
# A unit (a file or a folder here) imports only from levels above its own; inside a folder, files import each other.
LEVELS = (
    {"errors", "kernel"},
    {"config", "families", "foreign", "parallel", "rewrite", "tensor_files"},
    {"denoising", "flops", "generation", "state", "wan_checkpoint"},
    {"benchmark", "cards", "drop_in", "processor"},
    {"apply", "hub", "tuning"},
    {"doctor", "export_kernel", "lora", "report", "saved_models", "setter", "space", "weights"},
    {"compare", "conversion", "inside", "inspection", "push", "training"},
    {"pictures", "__init__"},
    {"report_picture"},
    {"cli"},
    {"__main__"},
)
KERNEL_MAY_IMPORT = {"torch", "triton"} | sys.stdlib_module_names
# Heavy or networked libraries -> the only units that import them, and not before they are needed.
ONLY_IN = {
    "triton": {"kernel", "benchmark"},
    "huggingface_hub": {"hub", "cards"},
    "matplotlib": {"pictures", "report_picture", "cli"},
    "skimage": {"compare"},
    "gradio": set(),
    "accelerate": {"training"},
    "peft": {"training"},
    "click": {"cli"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def imported_names(path: Path) -> list[tuple[int, str]]:
    """(relative level, dotted name) of every import in a file, those inside functions too; 0 is an absolute import."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found += [(node.level, name) for name in names]
    return found


def unit_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def test_every_unit_has_its_level():
    known = set().union(*LEVELS)
    assert {unit_of(path) for path in FILES} <= known
    assert sum(len(level) for level in LEVELS) == len(known)


def test_the_documentation_shows_every_unit():
    text = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    missing = {unit for unit in map(unit_of, FILES) if f"`{unit}`" not in text and f"`{unit}/`" not in text}
    assert missing <= {"__main__"}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_one_way(path):
    own = next(i for i, level in enumerate(LEVELS) if unit_of(path) in level)
    allowed = set().union(*LEVELS[:own])
    depth = len(path.relative_to(PACKAGE).parts)
    for level, name in imported_names(path):
        assert level <= depth, f"{path} reaches outside the package"
        if level == depth:
            assert name.split(".")[0] in allowed, f"{path} must not import {name}"
        assert not (level == 0 and name.split(".")[0] == "diffusers_sla"), f"{path}: use a relative import"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_libraries_stay_where_they_belong(path):
    for level, name in imported_names(path):
        library = name.split(".")[0]
        if level == 0 and library in ONLY_IN:
            assert unit_of(path) in ONLY_IN[library], f"{path} must not import {library}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "kernel").glob("*.py")), ids=name_of)
def test_kernel_is_exportable(path):
    for level, name in imported_names(path):
        assert level <= 1, f"{path} reaches outside kernel/"
        assert level == 1 or name.split(".")[0] in KERNEL_MAY_IMPORT, f"{path} imports {name}"


def test_reference_shares_no_code_with_what_it_checks():
    assert {name for level, name in imported_names(PACKAGE / "kernel" / "reference.py") if level} == set()


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_is_short_and_named_for_its_contents(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
    assert path.stem not in {"utils", "helpers", "common", "misc"}
