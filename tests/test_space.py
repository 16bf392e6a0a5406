import json
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner
from huggingface_hub import snapshot_download

from diffusers_sla import SLAHubError
from diffusers_sla.cli import main
from diffusers_sla.space import space_files


@pytest.fixture
def app(tmp_path):
    folder = tmp_path / "app"
    (folder / "sample").mkdir(parents=True)
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "x.pyc").write_bytes(b"x")
    (folder / ".env").write_text("HF_TOKEN=hf_secret")
    (folder / "app.py").write_text("import diffusers_sla\nprint(diffusers_sla.__file__)\n")
    (folder / "README.md").write_text("---\ntitle: T\nsdk: gradio\nsdk_version: 6.31.0\napp_file: app.py\n---\n")
    (folder / "requirements.txt").write_text("torch\n")
    (folder / "sample" / "a.safetensors").write_bytes(b"weights")
    return folder


def test_a_space_has_the_app_and_runs_with_the_package_beside_it(hub, app, tmp_path):
    name = "alice/demo"
    arguments = ["push-space", "--repo", name, "--app", str(app), "--private", "--json"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    repo = hub.repos["space", name]
    assert (repo.sdk, repo.private, len(repo.history())) == ("gradio", True, 2)
    tree = set(repo.resolve("main")[1].tree)
    assert {"app.py", "sample/a.safetensors", "diffusers_sla/kernel/api.py"} < tree
    assert "diffusers_sla/model_card_templates/state.md" in tree
    assert not any("__pycache__" in path or ".env" in path for path in tree)
    assert json.loads(CliRunner().invoke(main, arguments).stdout)["changed"] is False
    copy = snapshot_download(name, repo_type="space", local_dir=tmp_path / "copy")
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "app.py"], cwd=copy, env=clean, capture_output=True, text=True)
    assert done.stdout.strip() == str(tmp_path / "copy" / "diffusers_sla" / "__init__.py"), done.stderr[-500:]


def test_a_folder_without_app_is_refused_and_a_dry_run_asks_nobody(hub, app, tmp_path):
    with pytest.raises(SLAHubError, match=r"has no app\.py: push-space takes the folder space_app"):
        space_files(tmp_path)
    result = CliRunner().invoke(main, ["push-space", "--repo", "alice/x", "--app", str(app), "--dry-run", "-q"])
    assert "app.py" in result.stdout.splitlines()
    assert hub.requests == []
