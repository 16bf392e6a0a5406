import json
import re
from pathlib import Path

from diffusers_sla import SLAConfig

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_quick_start_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    assert len(code.splitlines()) <= 10
    monkeypatch.chdir(tmp_path)
    assert "space_app/sample_pipeline" in code
    code = code.replace("space_app/sample_pipeline", str(ROOT / "space_app" / "sample_pipeline"))
    exec(code.replace("num_inference_steps=12", "num_inference_steps=1"), {})
    assert {path.name for path in tmp_path.rglob("*.*")} == {
        "temple.png", "sla_attention.pt", "sla_attention.safetensors"
    }  # fmt: skip
    assert "transformer.transformer_blocks.6.attn1" in capsys.readouterr().out


def test_the_settings_table_has_every_setting_and_its_default():
    table = README.split("## Settings")[1].split("\n## ")[0]
    rows = [line.split("|") for line in table.splitlines() if line.startswith("|")]
    for name, default in SLAConfig().to_dict().items():
        row = next(row for row in rows if f"`{name}`" in row[1])
        assert json.dumps(default).strip('"') in row[2]
