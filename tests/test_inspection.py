import hashlib
import json
import pickle
import struct

import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import HfApi

from diffusers_sla import SLAConfig, SLAStateFormatError, push_sla_to_hub
from diffusers_sla.cli import main
from diffusers_sla.inspection import inspect_state
from diffusers_sla.state import SLAState, write_state

NAMES = ["sla_attention.pt", "sla_attention.safetensors"]


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    layers = {
        f"transformer.blocks.{i}.attn1": {"proj_l.weight": torch.randn(8, 8), "proj_l.bias": torch.randn(8)}
        for i in range(2)
    }
    state = SLAState(SLAConfig(topk=0.1).to_dict(), layers, {"base_model": "acme/base"})
    for name in NAMES:
        write_state(state, tmp_path / name)
    return tmp_path, state


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_described_whole(folder, name):
    folder, state = folder
    found = inspect_state(folder / name)
    weight = state.layers["transformer.blocks.1.attn1"]["proj_l.weight"]
    assert found.tensors["transformer.blocks.1.attn1"]["proj_l.weight"] == {
        "dtype": "float32", "shape": [8, 8],
        "norm": pytest.approx(weight.double().norm().item()),
    }  # fmt: skip
    assert (found.settings, found.problem) == (state.settings, None)
    assert found.digest == state.digest()
    assert found.sha256 == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    if name.endswith(".pt"):
        imports = ["collections.OrderedDict", "torch.FloatStorage", "torch._utils._rebuild_tensor_v2"]
        assert found.pickle_globals == imports
    text = str(found)
    assert "base model  acme/base" in text
    assert "layers      2, head size 8, 144 numbers" in text


def test_a_remote_header_is_described_without_its_tensors(hub, repo_id, folder):
    folder, state = folder
    push_sla_to_hub(folder, repo_id)
    hub.requests.clear()
    result = CliRunner().invoke(main, ["inspect", repo_id, "--json"])
    found = json.loads(result.stdout)
    assert found["tensors"]["transformer.blocks.0.attn1"]["proj_l.bias"] == {"dtype": "F32", "shape": [8]}
    assert (found["digest"], found["layout"]) == (state.digest(), "diffusers_sla, version 2")
    assert not any(".pt" in request for request in hub.requests)
    result = CliRunner().invoke(main, ["inspect", repo_id, "--weight-name", "sla_attention.pt"])
    assert "not read" not in result.stdout


def test_other_layouts_are_named(tmp_path):
    key = "blocks.0.self_attn.attn_op.local_attn.proj_l"
    weight = torch.ones(4, 4).bfloat16()
    checkpoint = {f"{key}.weight": weight, f"{key}.bias": torch.ones(4), "head.weight": torch.ones(2)}
    torch.save(checkpoint, tmp_path / "turbo.pth")
    found = inspect_state(tmp_path / "turbo.pth")
    assert found.layout == "turbodiffusion, beside 1 other tensors"
    described = {"dtype": "bfloat16", "shape": [4, 4], "norm": 4.0}
    assert found.tensors["transformer.blocks.0.attn1"]["proj_l.weight"] == described
    torch.save({"settings": {}, "state": {"4:bf16": {"proj_l.bias": torch.ones(4)}}, "version": 1}, tmp_path / "v1.pt")
    assert inspect_state(tmp_path / "v1.pt").layout == "SimpleTuner, version 1"


@pytest.mark.parametrize(
    ("change", "problem"),
    [({"version": 9}, "version 9"), ({"settings": {"topk": 7}}, "topk must be"), ({"digest": "x"}, "digest differs")],
)
def test_a_file_that_cannot_be_loaded_is_described_and_exits_1(tmp_path, change, problem):
    tensors = {"t.a": {"proj_l.weight": torch.zeros(4, 4), "proj_l.bias": torch.zeros(4)}}
    payload = {"format": "diffusers_sla", "version": 2, "settings": {}, "state": tensors, "meta": {}}
    torch.save(payload | change, tmp_path / "x.pt")
    result = CliRunner().invoke(main, ["inspect", str(tmp_path / "x.pt")])
    assert result.exit_code == 1
    assert problem in result.stdout.split("PROBLEM")[1]
    assert "t.a" in result.stdout


def test_code_is_named_and_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return exec, ("raise SystemExit",)

    torch.save({"format": "diffusers_sla", "state": Evil()}, tmp_path / "x.pt")
    with pytest.raises(SLAStateFormatError, match=r"its pickle imports __builtin__\.exec"):
        inspect_state(tmp_path / "x.pt")
    (tmp_path / "y.pt").write_bytes(pickle.dumps(Evil()))
    (tmp_path / "z.safetensors").write_bytes(struct.pack("<Q", 1 << 40))
    for name in "x.pt", "y.pt", "z.safetensors":
        result = CliRunner().invoke(main, ["inspect", str(tmp_path / name)])
        assert (result.exit_code, result.stdout, len(result.stderr.splitlines())) == (1, "", 1)


def safetensors_file(header):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(4)


TENSOR = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    "header",
    [
        [], "", b"{", b"\xff", {"x": 5}, {"__metadata__": None}, {"x": {"dtype": "F32", "shape": [1]}},
        {"x": TENSOR | {"shape": "a"}}, {"x": TENSOR | {"shape": [None]}}, {"x": TENSOR | {"shape": [10**30]}},
    ],
)  # fmt: skip
def test_a_remote_header_that_is_none_is_a_known_error(hub, repo_id, header):
    HfApi().create_repo(repo_id)
    HfApi().upload_file(path_or_fileobj=safetensors_file(header), path_in_repo=NAMES[1], repo_id=repo_id)
    result = CliRunner().invoke(main, ["inspect", repo_id])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("Error: ")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("remote", [True, False])
def test_what_a_file_says_does_nothing_to_the_terminal(hub, repo_id, tmp_path, remote):
    said = {"version": 2, "settings": {"topk": "\x1b[31m"}, "meta": {"base_model": "\x1b]0;name\x07\nfile  fake"}}
    header = {"__metadata__": {"diffusers_sla": json.dumps(said)}, "\x1b[2J.a.b": TENSOR | {"shape": []}}
    path = tmp_path / NAMES[1]
    path.write_bytes(safetensors_file(header))
    if remote:
        HfApi().create_repo(repo_id)
        HfApi().upload_file(path_or_fileobj=path, path_in_repo=NAMES[1], repo_id=repo_id)
    result = CliRunner().invoke(main, ["inspect", repo_id if remote else str(path)])
    assert (result.exit_code, result.exception.__class__) == (1, SystemExit)
    assert "base model  \\x1b]0;name\\x07\\nfile  fake\n" in result.stdout
    assert "\x1b" not in result.stdout
