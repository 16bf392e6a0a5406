"""SLA together with compile, offload, half precision and fp8 casting, where only a GPU shows whether it works."""

import copy
import warnings

import pytest
import torch
from models import make, output

from diffusers_sla import SLAConfig, apply_sla, sla_layers, sla_parameters

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

EXACT = SLAConfig(topk=1.0, blkq=16, blkk=16, min_length=0)
SPARSE = SLAConfig(topk=0.25, blkq=16, blkk=16, min_length=0)


def on_gpu(x, dtype=None):
    if isinstance(x, torch.Tensor):
        return x.to("cuda", dtype if x.is_floating_point() else None)
    if isinstance(x, dict):
        return {key: on_gpu(value, dtype) for key, value in x.items()}
    return [on_gpu(value, dtype) for value in x] if isinstance(x, list) and x and torch.is_tensor(x[0]) else x


def prepare(name, config=None, dtype=None, projection=0.0):
    """Model on the GPU, with SLA where there is a config, and its inputs."""
    model, inputs = make(name)
    model = model.to("cuda", dtype)
    if config is not None:
        apply_sla(model, config, strict=True)
        torch.manual_seed(1)
        for parameter in sla_parameters(model):
            torch.nn.init.normal_(parameter, std=projection) if projection else None
    return model, on_gpu(inputs, dtype)


def assert_near(actual, expected, share):
    assert torch.isfinite(actual).all()
    assert (actual - expected).abs().max() <= share * expected.abs().max()


def calls(model):
    return sum(layer.calls_sla for layer in sla_layers(model).values())


@pytest.mark.parametrize("name", ["unet", "flux", "wan", "sd3", "qwen", "chroma", "hunyuan_video", "prx", "mochi"])
@torch.no_grad()
def test_every_block_in_bfloat16_is_the_native_model(name):
    model, inputs = prepare(name, dtype=torch.bfloat16)
    expected = output(model, inputs)
    apply_sla(model, EXACT, strict=True)
    assert_near(output(model, inputs).float(), expected.float(), 0.05)
    assert calls(model) >= len(sla_layers(model)) > 0
    assert {p.dtype for p in sla_parameters(model)} == {torch.float32}


@pytest.mark.parametrize("name", ["qwen", "chroma", "flux", "wan"])
@torch.no_grad()
def test_nothing_waits_for_the_device(name):
    model, inputs = prepare(name, SPARSE)
    native, _ = prepare(name)
    output(native, inputs), output(model, inputs)
    waits = []
    for each in (native, model):
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                output(each, inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        waits.append(len(seen))
    assert waits[1] <= waits[0]


@pytest.mark.parametrize("way", ["whole", "regional"])
@pytest.mark.parametrize("name", ["wan", "flux", "qwen"])
@torch.no_grad()
def test_compiled_in_one_graph_and_no_oftener_than_native(name, way):
    counts = []
    for config in (None, SPARSE):
        torch._dynamo.reset()
        model, inputs = prepare(name, config, projection=0.1)
        expected = output(model, inputs)
        counter = _Counter()
        if way == "whole":
            compiled = torch.compile(model, fullgraph=True, backend=counter)
        else:
            model.compile_repeated_blocks(fullgraph=True, backend=counter)
            compiled = model
        seen = []
        for _ in range(3):
            actual = output(compiled, inputs)
            seen.append(counter.graphs)
        assert_near(actual, expected, 1e-3)
        counts.append(seen)
    assert counts[1] == counts[0]


class _Counter:
    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        from torch._inductor.compile_fx import compile_fx

        self.graphs += 1
        return compile_fx(graph, inputs)


@torch.no_grad()
def test_lengths_that_change_compile_no_oftener_than_native():
    counts = []
    for config in (None, SPARSE):
        torch._dynamo.reset()
        model, inputs = prepare("flux", config)
        counter = _Counter()
        model.compile_repeated_blocks(fullgraph=True, backend=counter)
        seen = []
        for text, side in ((9, 8), (11, 8), (13, 10), (17, 12), (20, 14)):
            inputs |= {
                "hidden_states": torch.randn(1, side * side, 4, device="cuda"),
                "img_ids": torch.rand(side * side, 3, device="cuda"), "txt_ids": torch.rand(text, 3, device="cuda"),
                "encoder_hidden_states": torch.randn(1, text, 32, device="cuda"),
            }  # fmt: skip
            output(model, inputs)
            seen.append(counter.graphs)
        counts.append(seen)
    assert counts[1] == counts[0]


@torch.no_grad()
def test_cuda_graphs_replay_it():
    torch._dynamo.reset()
    model, inputs = prepare("qwen", SPARSE, projection=0.1)
    expected = output(model, inputs)
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        actual = output(compiled, inputs).clone()
    assert_near(actual, expected, 1e-3)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["wan", "flux"])
def test_gradient_checkpointing_gives_the_same_gradients(name, compiled):
    gradients = []
    for checkpointing in (False, True):
        torch._dynamo.reset()
        model, inputs = prepare(name, SPARSE, projection=0.1)
        model.train()
        if checkpointing:
            model.enable_gradient_checkpointing()
            if compiled:
                model.compile_repeated_blocks(fullgraph=True)
        output(model, inputs).square().mean().backward()
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    plain, again = gradients
    assert plain.keys() == again.keys()
    largest = max(g.abs().max() for g in plain.values())
    for key, gradient in plain.items():
        assert (again[key] - gradient).abs().max() <= 2e-3 * largest, key


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
@pytest.mark.parametrize("stream", [False, True])
@torch.no_grad()
def test_group_offload_moves_the_projections_too(kind, stream):
    reference, inputs = prepare("wan", SPARSE, projection=0.1)
    expected = output(reference, inputs)
    model = copy.deepcopy(reference).to("cpu")
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    model.enable_group_offload(
        onload_device=torch.device("cuda"), offload_device=torch.device("cpu"), offload_type=kind, use_stream=stream,
        **blocks,
    )  # fmt: skip
    for _ in range(2):
        assert_near(output(model, inputs), expected, 1e-4)


@pytest.mark.parametrize("kind", ["cpu_offload", "cpu_offload_with_hook"])
@torch.no_grad()
def test_accelerate_offload_moves_the_projections_too(kind):
    accelerate = pytest.importorskip("accelerate")
    reference, inputs = prepare("flux", SPARSE, projection=0.1)
    expected = output(reference, inputs)
    model = copy.deepcopy(reference).to("cpu")
    getattr(accelerate, kind)(model, execution_device=torch.device("cuda"))
    assert_near(output(model, inputs), expected, 1e-4)


@pytest.mark.parametrize("name", ["wan", "flux"])
@torch.no_grad()
def test_fp8_casting_leaves_the_projections_alone(name):
    expected, kept = [], None
    for config in (None, EXACT):
        model, inputs = prepare(name, config, dtype=torch.bfloat16)
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
        expected.append(output(model, inputs).float())
        kept = model
    assert any(p.dtype is torch.float8_e4m3fn for p in kept.parameters())
    assert {p.dtype for p in sla_parameters(kept)} == {torch.float32}
    assert calls(kept) == len(sla_layers(kept))
    assert_near(expected[1], expected[0], 0.08)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_autocast(dtype):
    model, inputs = prepare("wan", SPARSE, projection=0.1)
    expected = output(model, inputs)
    with torch.autocast("cuda", dtype):
        assert_near(output(model, inputs).float(), expected, 0.05)
