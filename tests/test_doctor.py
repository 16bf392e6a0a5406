import json

import pytest
import torch
from click.testing import CliRunner

import diffusers_sla.doctor
from diffusers_sla.cli import main
from diffusers_sla.doctor import examine


def test_a_healthy_machine_passes_and_shows_no_token(hub):
    report = examine()
    assert report.passed
    checks = {check.name: check for check in report.checks}
    assert checks["eager implementation"].found.startswith("forward and backward within ")
    assert checks["hub"].found == f"{hub.url}: logged in as alice"
    assert checks["triton kernels"].passed is (True if torch.cuda.is_available() else None)
    text = str(report)
    assert "hf_alice_token" not in text
    assert "HF_TOKEN: (set)" in text
    assert report.versions["torch"].startswith(torch.__version__.split("+")[0])


def test_a_wrong_kernel_is_found_out(hub, monkeypatch):
    right = diffusers_sla.doctor.sla_attention
    wrong = lambda *args, impl, **kw: right(*args, impl=impl, **kw) * (1.01 if impl == "eager" else 1)  # noqa: E731
    monkeypatch.setattr(diffusers_sla.doctor, "sla_attention", wrong)
    result = CliRunner().invoke(main, ["doctor", "--offline"])
    assert result.exit_code == 1
    assert "eager implementation: FAILED - ValueError: off by 1" in result.stdout
    assert "hub: skipped" in result.stdout
    assert result.stderr == "Error: failed: eager implementation\n"
    assert hub.requests == []


@pytest.mark.parametrize("problem", ["unreachable", "refused"])
def test_a_hub_that_does_not_serve_us_fails(hub, monkeypatch, problem):
    if problem == "unreachable":
        hub.cut("before", times=99)
    else:
        hub.fail(401, times=99)
    result = CliRunner().invoke(main, ["doctor", "--json"])
    assert result.exit_code == 1
    found = {check["name"]: check["passed"] for check in json.loads(result.stdout)["checks"]}
    assert found["hub"] is False
    assert "hf_alice_token" not in result.output
