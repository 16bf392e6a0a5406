import copy
import pickle
import threading

import pytest
import torch
from diffusers import UNet2DModel
from models import make, output

import diffusers_sla.processor
from diffusers_sla import (
    SLAAttnProcessor,
    SLAConfig,
    SLAUnsupportedError,
    apply_sla,
    sla_disabled,
    sla_layers,
    sla_parameters,
    sla_report,
)
from diffusers_sla.apply import attention_clock
from diffusers_sla.families import FAMILIES

SPARSE = SLAConfig(topk=0.25, blkq=16, blkk=16)


@pytest.mark.parametrize("name", ["unet", "flux", "wan"])
def test_gradients_reach_projection_and_backbone(name):
    model, inputs = make(name)
    apply_sla(model, SPARSE)
    output(model, inputs).square().mean().backward()
    for parameter in sla_parameters(model):
        assert parameter.dtype is torch.float32
        assert parameter.grad.abs().max() > 0
    assert sum(p.grad is not None and bool(p.grad.any()) for p in model.parameters()) > len(sla_parameters(model))


@torch.no_grad()
def test_copies_and_pickles_compute_the_same_and_share_nothing():
    model, inputs = make("flux")
    apply_sla(model, SPARSE)
    next(iter(sla_parameters(model))).normal_()
    expected = output(model, inputs)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(twin, inputs), expected)
        assert {id(p) for p in sla_parameters(twin)}.isdisjoint(id(p) for p in sla_parameters(model))


@torch.no_grad()
def test_two_models_in_two_threads_do_not_mix():
    models = [make("flux") for _ in range(2)]
    apply_sla(models[0][0], SPARSE)
    apply_sla(models[1][0], SLAConfig(topk=0.75, blkq=16, blkk=16))
    expected = [output(*m) for m in models]
    seen = [[], []]

    def work(i):
        seen[i].extend(output(*models[i]) for _ in range(5))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(seen[i]) == 5 and all(torch.equal(o, expected[i]) for o in seen[i]) for i in range(2))


@torch.no_grad()
def test_a_saved_model_loads_as_the_native_one(tmp_path):
    model, inputs = make("wan")
    expected = output(model, inputs)
    apply_sla(model, SPARSE)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(output(again, inputs), expected)


def test_applying_again_takes_new_settings_and_keeps_projections():
    model, _ = make("wan")
    apply_sla(model, SPARSE)
    with torch.no_grad():
        for parameter in sla_parameters(model):
            parameter.normal_()
    before = [p.clone() for p in sla_parameters(model)]
    apply_sla(model, '{"topk": 0.5}')
    assert all(torch.equal(a, b) for a, b in zip(before, sla_parameters(model), strict=True))
    assert {layer.config.topk for layer in sla_layers(model).values()} == {0.5}


def test_casting_a_model_leaves_the_projection_in_float32():
    model, _ = make("wan")
    apply_sla(model, SPARSE)
    value = torch.full((12,), 1.0001)
    sla_parameters(model)[1].data.copy_(value)
    for cast in (lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.to(torch.float8_e4m3fn)):
        cast(model)
        assert {p.dtype for p in sla_parameters(model)} == {torch.float32}
        assert torch.equal(sla_parameters(model)[1], value)


def test_a_projection_that_comes_later_is_where_the_model_is():
    """Without a linear branch a layer has no weight that would tell."""
    model, _ = make("unet")
    apply_sla(model, SLAConfig(linear="none"))
    model.to("meta")
    for layer in sla_layers(model).values():
        assert not list(layer.state.parameters())
        assert layer.state.add_proj_s().device.type == "meta"


def test_disabled_runs_dense_and_says_so():
    model, inputs = make("dit")
    expected = output(model, inputs)
    apply_sla(model, SPARSE)
    with sla_disabled(model), attention_clock(model) as clock:
        assert torch.equal(output(model, inputs), expected)
    assert clock.calls == 2
    assert clock.seconds > 0
    for layer in sla_layers(model):
        seen = clock.layers[layer]
        assert (seen.calls, seen.query_shape, seen.key_shape, seen.kept) == (1, (1, 2, 64, 8), (1, 2, 64, 8), (0, 0))
    output(model, inputs)
    report = sla_report(model).to_dict()
    assert report["layers"]["transformer.transformer_blocks.0.attn1"] == {
        "runs": "sla", "why": "", "calls_sla": 1, "calls_dense": {"disabled": 1}, "frozen": False
    }  # fmt: skip
    assert "1 (disabled)" in str(sla_report(model))


def test_what_cannot_be_served_runs_dense_visibly_or_raises(caplog):
    model, _ = make("dit")
    apply_sla(model, SPARSE, strict=False)
    layer = next(iter(sla_layers(model).values()))
    x = torch.randn(1, 2, 32, 8)
    for _ in range(2):
        layer.attend_bhld(x, x, x, is_causal=True)
    assert layer.calls_dense == {"the call is causal": 2}
    assert caplog.text.count("runs dense: the call is causal") == 1
    layer.strict = True
    with pytest.raises(SLAUnsupportedError, match="the call is causal"):
        layer.attend_bhld(x, x, x, is_causal=True)
    layer.strict = None
    layer.train()
    with pytest.raises(SLAUnsupportedError, match="queries and keys differ in number: 32 and 16"):
        layer.attend_bhld(x, x[:, :, :16], x[:, :, :16])


@pytest.mark.parametrize("kind", [None, "product", "bias"])
def test_masks_that_hide_keys_are_read_and_others_refused(kind):
    def read(mask, row=0):
        return diffusers_sla.processor._key_mask(mask, x, x, kind, row)

    x = torch.randn(2, 3, 8, 4)
    keys = torch.rand(2, 8) > 0.3
    keys[:, -1] = True
    for mask in (keys[:, None, None], keys[:, None, None].expand(2, 3, 8, 8)):
        assert read(mask)[1] is None
        assert torch.equal(read(mask)[0], keys)
    outer = keys[:, None, :, None] & keys[:, None, None]
    numbers = outer.float() if kind == "product" else torch.zeros(2, 1, 8, 8).masked_fill(~outer, -1e4)
    if kind is None:
        assert "may differ from query to query" in read(outer)[1]
        assert "torch.float32" in read(numbers[:, :, :1])[1]
    else:
        assert torch.equal(read(outer, -1)[0], keys)
        assert torch.equal(read(numbers, -1)[0], keys)
    assert "has shape (2, 8)" in read(keys)[1]
    if kind is None:
        assert "may differ from head to head" in read(torch.ones(2, 3, 1, 8, dtype=torch.bool))[1]
    assert read(object())[1] == "the attention mask is a object"


def test_a_model_without_layers_for_sla_is_refused_by_name():
    convolutions = UNet2DModel(
        block_out_channels=(8, 8), norm_num_groups=4, down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2, mid_block_type=None,
    )  # fmt: skip
    with pytest.raises(SLAUnsupportedError, match="UNet2DModel has no attention layer"):
        apply_sla(convolutions)
    with pytest.raises(SLAUnsupportedError, match="no attention layer of Linear") as info:
        apply_sla(torch.nn.Linear(2, 2))
    assert str(info.value).endswith(
        f"of Linear. docs/models.md lists the {len(FAMILIES)} model classes that it serves"
    )
    near = type("FluxTransformer3DModel", (torch.nn.Module,), {})()
    with pytest.raises(SLAUnsupportedError, match=r"it knows Flux\w+ and Flux\w+\. docs/models\.md") as info:
        apply_sla(near)
    assert "FluxTransformer2DModel" in str(info.value)
    with pytest.raises(SLAUnsupportedError, match="model or pipeline is needed, got int"):
        apply_sla(3)


def test_a_template_says_that_it_belongs_to_no_layer():
    with pytest.raises(SLAUnsupportedError, match="belongs to no layer"):
        SLAAttnProcessor()(None, None)


@pytest.mark.parametrize("name", ["flux", "wan", "unet"])
def test_a_compiled_model_is_one_graph(name):
    torch._dynamo.reset()
    model, inputs = make(name)
    apply_sla(model, SPARSE)
    expected = output(model, inputs)
    actual = output(torch.compile(model, fullgraph=True, backend="eager"), inputs)
    torch.testing.assert_close(actual, expected)
