import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from click.testing import CliRunner

import diffusers_sla
from diffusers_sla import SLAConfigError, sla_attention
from diffusers_sla.cli import main
from diffusers_sla.export_kernel import BACKENDS, export_kernel

KERNEL = Path(diffusers_sla.__file__).parent / "kernel"
# Runs in a process of its own, where neither this package nor diffusers can be imported.
ALONE = """
import importlib.abc, sys
from pathlib import Path

class Nothing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        hidden = ["diffusers_sla", "diffusers", "transformers"] + ["triton"] * HIDE_TRITON
        if name.partition(".")[0] in hidden:
            raise ModuleNotFoundError(name)

HIDE_TRITON = "--no-triton" in sys.argv
sys.meta_path.insert(0, Nothing())
import torch, kernels
from torch import nn

inputs = torch.load("inputs.pt")
where = sys.argv[1]
if where.startswith("hub:"):
    sla = kernels.get_kernel(where[4:], version=1, trust_remote_code=True)
else:
    sla = kernels.get_local_kernel(Path(where))
assert sorted(sla.__all__) == ["layers", "select_blocks", "sla_attention"]
impl = sys.argv[2]
results = []
for x in inputs:
    q, k, v = (t.clone().requires_grad_() for t in x["qkv"])
    o = sla.sla_attention(q, k, v, proj_l_weight=x["weight"], impl=impl, **x["settings"])
    o.sum().backward()
    results.append([o.detach(), q.grad, k.grad, v.grad])

@kernels.use_kernel_forward_from_hub("SLAttention")
class Host(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.proj_l_weight = nn.Parameter(weight)

    def forward(self, query, key, value, **settings):
        raise NotImplementedError

model = nn.Sequential(Host(inputs[0]["weight"]))
if not where.startswith("hub:"):
    repository = kernels.LocalLayerRepository(Path(where), layer_name="SLAttention")
    with kernels.use_kernel_mapping({"SLAttention": {"cpu": repository}}):
        model = kernels.kernelize(model, mode=kernels.Mode.TRAINING, device="cpu")
    layer = model[0](*inputs[0]["qkv"], impl=impl, **inputs[0]["settings"])
    torch.testing.assert_close(layer, results[0][0])
torch.save(results, "results.pt")
assert "diffusers_sla" not in sys.modules
assert impl == "triton" or not HIDE_TRITON or "triton" not in sys.modules
"""


def alone(tmp_path, where, impl, *options, **environment):
    torch.manual_seed(0)
    inputs = [
        {"qkv": [torch.randn(1, 2, L, D) for _ in range(3)], "weight": torch.randn(D, D) / 8, "settings": settings}
        for L, D, settings in [
            (70, 16, {"topk": 0.4, "blkq": 16, "blkk": 16}),
            (48, 24, {"topk": 0.5, "blkq": 16, "blkk": 16, "linear": "marginal", "feature_map": "elu"}),
        ]
    ]
    torch.save(inputs, tmp_path / "inputs.pt")
    (tmp_path / "alone.py").write_text(ALONE)
    # Importing gradio may turn telemetry off, and then kernels 0.17 sends a header that no server accepts.
    dropped = ("PYTHONPATH", "HF_HUB_DISABLE_TELEMETRY")
    clean = {name: value for name, value in os.environ.items() if name not in dropped}
    done = subprocess.run(
        [sys.executable, "alone.py", str(where), impl, *options], cwd=tmp_path, env=clean | environment,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for x, result in zip(inputs, torch.load(tmp_path / "results.pt"), strict=True):
        q, k, v = (t.clone().requires_grad_() for t in x["qkv"])
        o = sla_attention(q, k, v, proj_l_weight=x["weight"], impl=impl, **x["settings"])
        o.sum().backward()
        for ours, theirs in zip([o.detach(), q.grad, k.grad, v.grad], result, strict=True):
            torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-6)


def test_a_local_export_gives_the_same_numbers_where_the_package_is_not(tmp_path):
    export_kernel(tmp_path / "kernel")
    alone(tmp_path, tmp_path / "kernel", "eager", "--no-triton")


def test_an_exports_triton_kernels_give_the_same_numbers(tmp_path):
    if not os.environ.get("TRITON_INTERPRET"):
        pytest.skip("TRITON_INTERPRET=1 is not set")
    export_kernel(tmp_path / "kernel")
    alone(tmp_path, tmp_path / "kernel", "triton")


def test_a_pushed_kernel_is_loaded_by_get_kernel(hub, tmp_path):
    arguments = ["export-kernel", str(tmp_path / "kernel"), "--push", "acme/sla-attention", "--json"]
    result = CliRunner().invoke(main, arguments)
    if huggingface_hub.__version__.startswith("1."):
        assert (result.exit_code, hub.requests) == (1, [])
        assert "cannot commit to kernel repositories; version 2 can" in result.stderr
        return
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["pushed"].endswith("kernels/acme/sla-attention/tree/v1")
    repo = hub.repos["kernel", "acme/sla-attention"]
    assert "build/torch-cuda/metadata.json" in repo.resolve("v1")[1].tree
    assert set(repo.resolve("main")[1].tree) == {".gitattributes", "README.md"}
    assert "unchanged" in CliRunner().invoke(main, arguments[:-1]).stdout
    alone(tmp_path, "hub:acme/sla-attention", "eager", HF_HOME=str(tmp_path / "home"))


def test_the_metadata_is_what_the_loader_and_its_digests_say(tmp_path):
    from kernels._rust import Digest, Metadata

    builds = export_kernel(tmp_path, kernel_version=3)
    assert [build.name for build in builds] == [f"torch-{backend}" for backend in BACKENDS]
    ids = set()
    for build, backend in zip(builds, BACKENDS, strict=True):
        metadata = Metadata.read_from_file(build / "metadata.json")
        assert (metadata.version, metadata.license, metadata.python_depends) == (3, "apache-2.0", [])
        metadata.digest.validate(Digest.hash_variant(metadata.digest.algorithm, build))
        assert metadata.id.isidentifier()
        assert backend in metadata.id
        assert f'"{metadata.id}::"' in (build / "_ops.py").read_text()
        ids.add(metadata.id)
    assert len(ids) == 4
    first = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    export_kernel(tmp_path, kernel_version=3)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == first


def test_wrong_requests_are_refused(tmp_path):
    with pytest.raises(SLAConfigError, match="backends must be some of cuda, rocm, xpu, cpu, got metal"):
        export_kernel(tmp_path, backends=["cpu", "metal"])
    with pytest.raises(SLAConfigError, match="0 or more, got -1"):
        export_kernel(tmp_path, kernel_version=-1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", sorted(KERNEL.glob("*.py")), ids=lambda path: path.name)
def test_the_kernels_code_obeys_the_rules_of_an_export(path):
    """Relative imports inside, torch, triton and the standard library outside, the syntax of Python 3.9."""
    tree = ast.parse(path.read_text(), feature_version=(3, 9))
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Match), "match needs Python 3.10"
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1, f"line {node.lineno} reaches outside of the folder"
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
            for name in names:
                root = name.partition(".")[0]
                assert root in {"torch", "triton"} | sys.stdlib_module_names, f"line {node.lineno} imports {name}"
        annotations = [getattr(node, "annotation", None), getattr(node, "returns", None)]
        for annotation in filter(None, annotations):
            text = ast.unparse(annotation)
            assert "|" not in text, f"line {node.lineno}: unions in annotations need Python 3.10"
            assert not re.search(r"\b(list|tuple|dict)\[", text) or sys.version_info >= (3, 9)
    slots = [keyword.arg for node in ast.walk(tree) if isinstance(node, ast.Call) for keyword in node.keywords]
    assert not {"slots", "kw_only", "strict"} & set(slots), "slots, kw_only and zip's strict need Python 3.10"


def test_all_is_a_literal_list_and_complete():
    tree = ast.parse((KERNEL / "__init__.py").read_text())
    value = next(node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "__all__")
    assert all(hasattr(diffusers_sla.kernel, name) for name in ast.literal_eval(value))
