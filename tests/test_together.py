"""SLA together with what people do to models: checkpointing, compiling, casting, offloading, adapters, caches."""

import copy

import pytest
import torch
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.hooks import TaylorSeerCacheConfig
from diffusers.training_utils import EMAModel
from models import make, output
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from diffusers_sla import SLAConfig, SLAUnsupportedError, apply_sla, sla_layers, sla_parameters, sla_report

SPARSE = SLAConfig(topk=0.25, blkq=16, blkk=16)
EXACT = SLAConfig(topk=1.0, blkq=16, blkk=16)


def prepare(name, config=SPARSE, projection=0.1):
    """Model with SLA and projections that are not zero, and its inputs."""
    model, inputs = make(name)
    apply_sla(model, config)
    torch.manual_seed(1)
    for parameter in sla_parameters(model):
        nn.init.normal_(parameter, std=projection) if projection else None
    return model, inputs


def gradients_of(model, inputs):
    output(model, inputs).square().mean().backward()
    found = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same_gradients(actual, expected, share=1e-4):
    assert actual.keys() == expected.keys()
    largest = max(g.abs().max() for g in expected.values())
    for key, gradient in expected.items():
        assert (actual[key] - gradient).abs().max() <= share * largest, key


def projections(model):
    return [p.detach().clone() for p in sla_parameters(model)]


def assert_same_projections(model, before):
    after = sla_parameters(model)
    assert len(after) == len(before) > 0
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("name", ["flux", "wan", "unet", "hunyuan_video", "lumina2", "qwen"])
def test_gradient_checkpointing_gives_the_same_gradients(name):
    model, inputs = prepare(name)
    model.train()
    expected = gradients_of(model, inputs)
    model.enable_gradient_checkpointing()
    assert_same_gradients(gradients_of(model, inputs), expected)


@pytest.mark.parametrize("name", ["flux", "wan"])
@pytest.mark.parametrize("way", [pytest.param("whole", marks=pytest.mark.slow), "regional"])
def test_compiled_with_checkpointing_gives_the_same_gradients(name, way):
    torch._dynamo.reset()
    model, inputs = prepare(name)
    model.train()
    expected = gradients_of(model, inputs)
    model.enable_gradient_checkpointing()
    if way == "whole":
        model.compile(backend="aot_eager", fullgraph=True)
    else:
        model.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    assert_same_gradients(gradients_of(model, inputs), expected)


@pytest.mark.parametrize(
    ("way", "name"),
    [("whole", "flux"), ("whole", "wan")]
    + [("regional", name) for name in ("flux", "wan", "unet", "qwen", "chroma", "hunyuan_video")]
    + [pytest.param("whole", name, marks=pytest.mark.slow) for name in ("unet", "qwen", "chroma", "hunyuan_video")],
)
@torch.no_grad()
def test_compiles_to_as_many_graphs_as_native(way, name):
    counts = []
    for config in (None, SPARSE):
        torch._dynamo.reset()
        model, inputs = make(name) if config is None else prepare(name)
        expected = output(model, inputs)
        counter = CompileCounterWithBackend("eager")
        if way == "whole":
            compiled = torch.compile(model, backend=counter, fullgraph=True)
        else:
            model.compile_repeated_blocks(backend=counter, fullgraph=True)
            compiled = model
        first = output(compiled, inputs)
        once = counter.frame_count
        torch.testing.assert_close(output(compiled, inputs), expected)
        torch.testing.assert_close(first, expected)
        counts.append((once, counter.frame_count))
    assert counts[1] == counts[0]
    assert counts[0][0] == counts[0][1]


@pytest.mark.slow
@torch.no_grad()
def test_inductor_computes_the_same():
    torch._dynamo.reset()
    model, inputs = prepare("flux")
    expected = output(model, inputs)
    torch.testing.assert_close(output(torch.compile(model, fullgraph=True), inputs), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("offload", ["sequential", "whole", "group leaf", "group block"])
@torch.no_grad()
def test_offloading_moves_the_projections_with_their_layers(offload):
    accelerate = pytest.importorskip("accelerate")
    model, inputs = prepare("wan")
    expected = output(model, inputs)
    cpu = torch.device("cpu")
    if offload == "sequential":
        accelerate.cpu_offload(model, execution_device=cpu)
        assert {p.device.type for p in sla_parameters(model)} == {"meta"}
    elif offload == "whole":
        accelerate.cpu_offload_with_hook(model, execution_device=cpu)
    else:
        kind = {"offload_type": "leaf_level"} if offload == "group leaf" else {"offload_type": "block_level", "num_blocks_per_group": 1}  # fmt: skip  # noqa: E501
        model.enable_group_offload(onload_device=cpu, offload_device=cpu, **kind)
    for _ in range(2):
        assert torch.equal(output(model, inputs), expected)


@torch.no_grad()
def test_sla_on_a_model_that_is_offloaded_already():
    accelerate = pytest.importorskip("accelerate")
    model, inputs = prepare("wan")
    expected, state = output(model, inputs), projections(model)
    cpu = torch.device("cpu")
    model, _ = make("wan")
    model.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    apply_sla(model, SPARSE)
    for parameter, value in zip(sla_parameters(model), state, strict=True):
        parameter.copy_(value)
    assert torch.equal(output(model, inputs), expected)
    assert all(hasattr(layer.state, "_diffusers_hook") for layer in sla_layers(model).values())
    model, _ = make("wan")
    accelerate.cpu_offload(model, execution_device=cpu)
    with pytest.raises(SLAUnsupportedError, match="call apply_sla before enable_sequential_cpu_offload"):
        apply_sla(model, SPARSE)
    assert not sla_layers(model)


@torch.no_grad()
def test_layerwise_casting_leaves_the_projections_alone():
    outputs = []
    for config in (None, EXACT):
        model, inputs = make("wan")
        if config:
            apply_sla(model, config)
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        outputs.append(output(model, inputs))
    assert any(p.dtype is torch.float8_e4m3fn for p in model.parameters())
    assert {p.dtype for p in sla_parameters(model)} == {torch.float32}
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double().float()])
@torch.no_grad()
def test_casts_run_and_keep_the_projections_in_float32(cast):
    model, inputs = prepare("flux", EXACT, projection=0.0)
    before = projections(model)
    expected = output(model, inputs)
    cast(model)
    inputs = {key: x.to(model.dtype) if x.is_floating_point() else x for key, x in inputs.items()}
    actual = output(model, inputs).float()
    assert (actual - expected).abs().max() < 0.05 * expected.abs().max()
    assert_same_projections(model, before)
    assert {layer.calls_sla for layer in sla_layers(model).values()} == {2}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("targets", ["all-linear", ["to_q", "to_v"]])
def test_lora_neither_wraps_the_projections_nor_freezes_them_in_silence(when, targets, caplog):
    peft = pytest.importorskip("peft")
    model, inputs = make("wan")
    lora = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    if when == "before":
        model.add_adapter(lora)
        apply_sla(model, SPARSE)
    else:
        apply_sla(model, SPARSE)
        model.add_adapter(lora)
    model.train()
    names = [key for key, _ in model.named_parameters()]
    assert any("lora_A" in key for key in names)
    assert not any("lora" in key and ".processor." in key for key in names)
    found = gradients_of(model, inputs)
    assert ("projections frozen" in caplog.text) == (when == "after")
    assert {layer.frozen for layer in sla_report(model).layers.values() if layer.runs == "sla"} == {when == "after"}
    for parameter in sla_parameters(model):
        parameter.requires_grad_(True)
    found = gradients_of(model, inputs)
    assert sum(".state." in key for key in found) == 4
    assert any("lora_A" in key for key in found)
    assert all(".state." in key or "lora" in key for key in found)
    model.delete_adapters("default")
    assert len(sla_layers(model)) == 2


def test_sla_is_put_on_the_model_inside_of_wrappers():
    peft = pytest.importorskip("peft")
    model, inputs = make("flux")
    wrapped = torch.compile(peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["to_q"])))
    apply_sla(wrapped, SPARSE)
    assert sla_parameters(model) == sla_parameters(wrapped)
    output(wrapped._orig_mod, inputs)  # eager: the text is counted in there, too
    assert {layer.calls_sla for layer in sla_layers(wrapped).values()} == {1}


@pytest.mark.parametrize("name", ["unet", "auraflow", "cogvideox", "pixart", "hunyuan_dit", "flux", "wan"])
@torch.no_grad()
def test_fused_projections_come_and_go_under_sla(name):
    model, inputs = prepare(name)
    expected, before = output(model, inputs), projections(model)
    model.fuse_qkv_projections()
    assert_same_projections(model, before)
    torch.testing.assert_close(output(model, inputs), expected, rtol=1e-4, atol=1e-5)
    sla_parameters(model)[0].add_(1.0)  # trained while fused
    before = projections(model)
    changed = output(model, inputs)
    model.unfuse_qkv_projections()
    assert_same_projections(model, before)
    torch.testing.assert_close(output(model, inputs), changed, rtol=1e-4, atol=1e-5)


def _ip_adapter(model):
    """A random IP-Adapter's weights, as the loaders take them, for a tiny model."""
    torch.manual_seed(2)
    weights, key = {}, 1
    for name in model.attn_processors:
        if name.endswith("attn2.processor"):
            attn = model.get_submodule(name.removesuffix(".processor"))
            for which in ("to_k_ip", "to_v_ip"):
                weights[f"{key}.{which}.weight"] = torch.randn(attn.inner_dim, 8)
            key += 2
    projection = {"proj.weight": torch.randn(4 * 8, 6), "proj.bias": torch.zeros(32), "norm.weight": torch.ones(8), "norm.bias": torch.zeros(8)}  # fmt: skip  # noqa: E501
    return {"image_proj": projection, "ip_adapter": weights}


def test_ip_adapters_come_and_go_beside_sla():
    from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0

    model, inputs = prepare("unet")
    with torch.no_grad():
        expected = output(model, inputs)
    before = projections(model)
    model._load_ip_adapter_weights([_ip_adapter(model)], low_cpu_mem_usage=False)
    assert_same_projections(model, before)
    kinds = {key: type(p).__name__ for key, p in model.attn_processors.items()}
    assert {kind for key, kind in kinds.items() if ".attn1." in key} == {"SLAAttnProcessor2_0"}
    assert {kind for key, kind in kinds.items() if ".attn2." in key} == {"IPAdapterAttnProcessor2_0"}
    with torch.no_grad():
        with_image = output(model, inputs | {"added_cond_kwargs": {"image_embeds": [torch.randn(2, 1, 6)]}})
    assert not torch.allclose(with_image, expected, atol=1e-3)

    # What `unload_ip_adapter` of a pipeline does:
    model.encoder_hid_proj, model.config.encoder_hid_dim_type = None, None
    model.set_attn_processor(
        {
            key: AttnProcessor2_0() if isinstance(p, IPAdapterAttnProcessor2_0) else p.__class__()
            for key, p in model.attn_processors.items()
        }
    )
    assert_same_projections(model, before)
    with torch.no_grad():
        torch.testing.assert_close(output(model, inputs), expected)


@torch.no_grad()
def test_an_ip_adapter_on_sla_layers_of_flux():
    from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxIPAdapterAttnProcessor

    model, inputs = prepare("flux")
    model.train()  # strict: the adapter's own attention is no refusal
    expected, before = output(model, inputs), projections(model)

    def adapt(key, processor):
        if key.startswith("single"):
            return processor.__class__()
        return FluxIPAdapterAttnProcessor(32, 32, num_tokens=[4], scale=[1.0])

    model.set_attn_processor({key: adapt(key, p) for key, p in model.attn_processors.items()})
    assert_same_projections(model, before)
    assert all(isinstance(p, FluxIPAdapterAttnProcessor) for key, p in model.attn_processors.items() if "single" not in key)  # fmt: skip  # noqa: E501
    assert [key for key, _ in model.named_parameters() if "to_k_ip" in key and key.endswith("weight")] == [
        "transformer_blocks.0.attn.processor.to_k_ip.0.weight"
    ]
    kwargs = {"joint_attention_kwargs": {"ip_hidden_states": [torch.randn(1, 4, 32)], "ip_adapter_masks": None}}
    assert not torch.allclose(output(model, inputs | kwargs), expected, atol=1e-3)
    layer = sla_layers(model)["transformer.transformer_blocks.0.attn"]
    assert (layer.calls_sla, layer.calls_dense) == (1, {"cross-attention to an image prompt": 1})

    model.set_attn_processor(
        {
            key: FluxAttnProcessor() if isinstance(p, FluxIPAdapterAttnProcessor) else p.__class__()
            for key, p in model.attn_processors.items()
        }
    )
    assert_same_projections(model, before)
    torch.testing.assert_close(output(model, inputs), expected)


@torch.no_grad()
def test_an_ip_adapter_on_sla_layers_of_sd3():
    from diffusers.models.attention_processor import JointAttnProcessor2_0, SD3IPAdapterJointAttnProcessor2_0

    model, inputs = prepare("sd3")
    expected, before = output(model, inputs), projections(model)
    adapters = {key: SD3IPAdapterJointAttnProcessor2_0(16, 8, 8, 16) for key in model.attn_processors}
    model.set_attn_processor(dict(adapters))
    assert_same_projections(model, before)
    torch.testing.assert_close(output(model, inputs), expected)  # without an image prompt
    assert {layer.calls_sla for layer in sla_layers(model).values()} == {1}
    model.set_attn_processor({key: JointAttnProcessor2_0() for key in adapters})
    assert_same_projections(model, before)


@pytest.mark.parametrize(
    "cache",
    [
        FirstBlockCacheConfig(threshold=0.2),
        TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1, max_order=1),
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(0, 1000),
            spatial_attention_block_identifiers=["blocks"], current_timestep_callback=lambda: 500,
        ),
    ],
    ids=lambda cache: type(cache).__name__,
)  # fmt: skip
@torch.no_grad()
def test_caches_do_with_it_what_they_do_with_native(cache):
    results = []
    for config in (None, EXACT):
        model, inputs = make("wan")
        if config:
            apply_sla(model, config)
        model.enable_cache(copy.deepcopy(cache))
        with model.cache_context("cond"):
            results.append([output(model, inputs | {"timestep": torch.tensor([t])}) for t in (900, 890, 880)])
    for native, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, native, rtol=1e-4, atol=1e-5)
    assert sum(layer.calls_sla for layer in sla_layers(model).values()) > 0


@pytest.mark.parametrize("scores", [False, True])
@torch.no_grad()
def test_guiders_that_skip_attention_still_do(scores):
    from diffusers.hooks import LayerSkipConfig, apply_layer_skip

    results = []
    for config in (None, EXACT):
        model, inputs = make("dit")
        plain = output(model, inputs)
        if config:
            apply_sla(model, config)
        skip = LayerSkipConfig(
            [0], fqn="transformer_blocks", skip_attention=not scores, skip_attention_scores=scores, skip_ff=False
        )
        apply_layer_skip(model, skip)
        results.append(output(model, inputs))
    assert not torch.allclose(results[0], plain, atol=1e-4)
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    layer = sla_layers(model)["transformer.transformer_blocks.0.attn1"]
    assert layer.calls_dense == ({"a guider skips the attention scores": 1} if scores else {})
    assert layer.calls_sla == 0


@torch.no_grad()
def test_ema_follows_the_projections_too():
    model, inputs = prepare("wan")
    average = EMAModel(model.parameters(), decay=0.5, model_cls=type(model), model_config=model.config)
    start = projections(model)
    for parameter in model.parameters():
        parameter.add_(1.0)
    average.step(model.parameters())
    average.store(model.parameters())
    average.copy_to(model.parameters())
    for now, then in zip(sla_parameters(model), start, strict=True):
        assert ((now - then) > 0).all()
        assert ((now - then) <= 1).all()
    output(model, inputs)
    average.restore(model.parameters())
    for now, then in zip(sla_parameters(model), start, strict=True):
        torch.testing.assert_close(now, then + 1)


def test_ema_cannot_be_saved_with_the_projections_in_it(tmp_path):
    """Diffusers zips the averages with a new native model; docs/using.md says what to do instead."""
    model, _ = prepare("wan")
    average = EMAModel(model.parameters(), model_cls=type(model), model_config=model.config)
    with pytest.raises(RuntimeError, match="size of tensor"):
        average.save_pretrained(tmp_path)


@pytest.mark.parametrize("first", ["SLA", "quantised"])
@pytest.mark.parametrize("name", ["wan", "flux"])
@pytest.mark.parametrize("library", ["torchao", "bitsandbytes"])
@torch.no_grad()
def test_quantised_linears_do_not_touch_the_projections(library, name, first):
    pytest.importorskip(library)
    model, inputs = make(name)
    if first == "quantised":
        quantise(model, library)
    apply_sla(model, SPARSE)
    for parameter in sla_parameters(model):
        parameter.fill_(0.01)
    expected = output(model, inputs)
    if first == "SLA":
        quantise(model, library)
    actual = output(model, inputs)
    assert {p.dtype for p in sla_parameters(model)} == {torch.float32}
    assert all((p == 0.01).all() for p in sla_parameters(model))
    assert (actual - expected).norm() <= (0.03 if first == "SLA" else 0) * expected.norm()
    assert {layer.calls_sla for layer in sla_layers(model).values()} == {2}


def quantise(model, library):
    """All linear layers to int8."""
    if library == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(model, Int8WeightOnlyConfig())
        return
    from bitsandbytes.nn import Linear8bitLt

    for path, old in list(model.named_modules()):
        if type(old) is torch.nn.Linear:
            new = Linear8bitLt(old.in_features, old.out_features, old.bias is not None, has_fp16_weights=False)
            new.load_state_dict(old.state_dict())
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, new)
