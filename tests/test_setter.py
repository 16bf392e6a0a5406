import copy
import inspect

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor
from diffusers.models.transformers.transformer_flux2 import Flux2KVAttnProcessor
from models import MODELS, make, output
from pipelines import make_pipeline

from diffusers_sla import (
    SLAAttnProcessor,
    SLAConfig,
    SLAUnsupportedError,
    apply_sla,
    remove_sla,
    sla_layers,
    sla_parameters,
    sla_step,
)
from diffusers_sla.setter import SWITCHES

SPARSE = SLAConfig(topk=0.25, blkq=16, blkk=16)


def kinds(model, which):
    return {type(p) for key, p in model.attn_processors.items() if f".{which}." in key}


@pytest.mark.parametrize("name", ["unet", "flux", "wan", "sd3"])
def test_the_setter_binds_one_processor_per_self_attention_layer(name):
    model, _ = make(name)
    native = {key: type(processor) for key, processor in model.attn_processors.items()}
    model.set_attn_processor(SLAAttnProcessor(topk=0.15))
    after = model.attn_processors
    bound = {key: p for key, p in after.items() if isinstance(p, SLAAttnProcessor)}
    assert len(bound) == len({id(p) for p in bound.values()}) == MODELS[name][1]
    assert {key: type(p) for key, p in after.items() if key not in bound} == {
        key: kind for key, kind in native.items() if key not in bound
    }
    assert all(p.config.topk == 0.15 for p in bound.values())
    assert not any(".attn2." in key for key in bound if name in ("unet", "wan"))


def test_the_setter_still_takes_native_processors():
    model, inputs = make("wan")
    expected = output(model, inputs)
    native = dict(model.attn_processors)
    model.set_attn_processor(SLAAttnProcessor())
    model.set_attn_processor(dict(native))
    assert model.attn_processors == native
    assert torch.equal(output(model, inputs), expected)


class TwoTransformers(DiffusionPipeline):
    def __init__(self, transformer, transformer_2, scheduler):
        super().__init__()
        self.register_modules(transformer=transformer, transformer_2=transformer_2, scheduler=scheduler)


def test_a_pipelines_setter_serves_all_of_its_denoisers():
    pipe = TwoTransformers(make("wan")[0], make("wan")[0], FlowMatchEulerDiscreteScheduler())
    pipe.set_attn_processor(SLAAttnProcessor(topk=0.1))
    assert list(sla_layers(pipe)) == [
        f"{name}.blocks.{i}.attn1" for name in ("transformer", "transformer_2") for i in range(2)
    ]
    assert len(sla_parameters(pipe)) == 8
    remove_sla(pipe)
    assert sla_layers(pipe) == {}


@pytest.mark.parametrize(
    ("switch", "value", "others"),
    [
        ("enable_attention_slicing", ("auto",), SlicedAttnProcessor),
        ("enable_attention_slicing", (1,), SlicedAttnProcessor),
        ("disable_attention_slicing", (), AttnProcessor2_0),
        ("disable_xformers_memory_efficient_attention", (), AttnProcessor2_0),
    ],
)
@torch.no_grad()
def test_a_pipelines_switches_reach_the_layers_without_sla(switch, value, others):
    pipe, (_, inputs) = make_pipeline("sd"), make("unet")
    apply_sla(pipe, SPARSE)
    for parameter in sla_parameters(pipe):
        parameter.normal_(std=0.1)
    expected, before, layers = output(pipe.unet, inputs), sla_parameters(pipe), sla_layers(pipe)
    getattr(pipe, switch)(*value)
    assert kinds(pipe.unet, "attn2") == {others}
    assert len(layers) == 4
    assert all(layers[name] is layer for name, layer in sla_layers(pipe).items())
    assert [id(p) for p in sla_parameters(pipe)] == [id(p) for p in before]
    torch.testing.assert_close(output(pipe.unet, inputs), expected)
    remove_sla(pipe)
    getattr(pipe, switch)(*value)
    assert kinds(pipe.unet, "attn1") == {others}


@pytest.mark.parametrize("switch", SWITCHES)
def test_each_switch_of_a_layer_spares_sla_alone(switch):
    model, _ = make("unet")
    block = model.mid_block.attentions[0].transformer_blocks[0]
    apply_sla(model, SPARSE)
    bound = block.attn1.processor
    for value in (1, None):  # what it takes to enable xformers and the NPU is not here, and not asked for
        getattr(block.attn1, switch)(value)
        assert block.attn1.processor is bound
    native = block.attn2.processor
    getattr(block.attn2, switch)(None)
    assert type(block.attn2.processor) is AttnProcessor2_0
    assert block.attn2.processor is not native


def test_there_is_no_other_switch_of_a_layer():
    functions = {name: inspect.unwrap(f) for name, f in vars(Attention).items() if inspect.isfunction(f)}
    setters = {name for name, function in functions.items() if "set_processor" in function.__code__.co_names}
    assert setters == {"__init__", *SWITCHES}


@pytest.mark.parametrize(
    ("name", "path", "processor"),
    [
        ("unet", "mid_block.attentions.0.transformer_blocks.0.attn1", AttnProcessor()),
        ("unet", "mid_block.attentions.0.transformer_blocks.0.attn1", SLAAttnProcessor()),
        ("flux2", "transformer_blocks.0.attn", Flux2KVAttnProcessor()),  # as Flux2KleinKVPipeline does
    ],
)
def test_a_layers_own_setter_does_not_drop_sla(name, path, processor):
    model, _ = make(name)
    attn = model.get_submodule(path)
    apply_sla(model, SPARSE)
    bound = attn.processor
    with pytest.raises(
        SLAUnsupportedError, match=rf"{type(processor).__name__} would .* call remove_sla\(model\) first"
    ):
        attn.set_processor(processor)
    assert attn.processor is bound
    attn.set_processor(bound)
    remove_sla(model)
    attn.set_processor(processor)
    assert attn.processor is processor


def test_a_layer_that_has_no_sla_takes_any_processor():
    model, _ = make("unet")
    apply_sla(model, SPARSE)
    attn, processor = model.mid_block.attentions[0].transformer_blocks[0].attn2, AttnProcessor()
    attn.set_processor(processor)
    assert attn.processor is processor
    assert len(sla_layers(model)) == 4


@pytest.mark.parametrize("name", ["unet", "pixart", "hunyuan_dit"])
def test_the_default_processors_come_back_after_remove_sla(name):
    model, _ = make(name)
    apply_sla(model, SPARSE)
    number = len(sla_layers(model))
    assert number > 0
    for same in (model, copy.deepcopy(model)):
        with pytest.raises(SLAUnsupportedError, match=r"set_default_attn_processor .* call remove_sla\(model\) first"):
            same.set_default_attn_processor()
        assert len(sla_layers(same)) == number
        remove_sla(same)
        before = dict(same.attn_processors)
        same.set_default_attn_processor()
        assert all(p is not before[key] for key, p in same.attn_processors.items())


@torch.no_grad()
def test_a_pipeline_that_borrows_the_layers_gives_sla_back(caplog):
    """As Attend-and-Excite does: processors of its own for a run, then those that were there."""
    model, inputs = make("flux")
    native = dict(model.attn_processors)
    apply_sla(model, SLAConfig(**SPARSE.to_dict() | {"dense_steps": [0]}))
    with sla_step(model, 1, 2):
        expected = output(model, inputs)
    ours = dict(model.attn_processors)
    model.set_attn_processor(native)
    assert caplog.text.count("took SLA and its projections out of 2 attention layers of FluxTransformer2DModel") == 1
    assert not sla_layers(model)
    model.set_attn_processor(dict(ours))
    assert model.attn_processors == ours
    with sla_step(model, 0, 2):
        output(model, inputs)
    with sla_step(model, 1, 2):
        assert torch.equal(output(model, inputs), expected)
    counts = {(layer.calls_sla, layer.calls_dense["dense_steps"]) for layer in sla_layers(model).values()}
    assert counts == {(2, 1)}
    assert caplog.text.count("took SLA") == 1
