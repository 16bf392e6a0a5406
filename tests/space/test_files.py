"""What the Hub reads of the folder: front matter and requirements."""

import re
import tomllib

import gradio
import yaml
from conftest import ROOT
from packaging.requirements import Requirement

from diffusers_sla.space import space_files

SPACE = ROOT / "space_app"


def test_front_matter_is_what_spaces_take():
    _, front, _ = (SPACE / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    facts = yaml.safe_load(front)
    colours = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
    assert {facts["colorFrom"], facts["colorTo"]} <= colours
    assert (facts["sdk"], facts["app_file"], facts["python_version"]) == ("gradio", "app.py", "3.12")
    assert (SPACE / facts["app_file"]).is_file()
    assert len(facts["short_description"]) <= 60
    pinned = re.search(r"^gradio==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    assert facts["sdk_version"] == pinned == gradio.__version__


def test_requirements_are_the_packages_own_and_what_the_space_adds():
    lines = (SPACE / "requirements.txt").read_text().splitlines()
    needed = {r.name: r.specifier for r in map(Requirement, (line for line in lines if not line.startswith("#")))}
    assert "gradio" not in needed  # sdk_version brings it
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for line in (*project["dependencies"], *project["optional-dependencies"]["demo"]):
        required = Requirement(line)
        assert required.name in needed, required.name
        if required.name != "torch":  # bounded by what ZeroGPU offers
            assert needed[required.name] == required.specifier


def test_the_folder_is_small_enough_to_upload():
    assert sum(path.stat().st_size for path in SPACE.rglob("*") if path.is_file()) < 45e6
    sample = [path for name in ("sample_pipeline", "sample_state") for path in (SPACE / name).rglob("*")]
    assert sum(path.stat().st_size for path in sample if path.is_file()) <= 40_000_000


def test_what_is_uploaded_has_the_app_the_pipeline_and_the_speed_records():
    files = space_files()
    assert {"app.py", "serving.py", "sample_pipeline/model_index.json", "diffusers_sla/compare.py"} <= files.keys()
    records = {path.name for path in (ROOT / "benchmarks").glob("*.json")}
    assert {name.removeprefix("benchmarks/") for name in files if name.startswith("benchmarks/")} == records
