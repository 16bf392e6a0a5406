import copy
import pickle

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from models import make, output
from torch._dynamo.testing import CompileCounterWithBackend

from diffusers_sla import (
    SLAConfig,
    SLAConfigError,
    apply_sla,
    load_sla_weights,
    remove_sla,
    save_sla_weights,
    sla_layers,
    sla_parameters,
    sla_report,
    sla_step,
)

BLOCKS = {"topk": 0.25, "blkq": 16, "blkk": 16}


class Pipeline(DiffusionPipeline):
    """A denoising loop without text encoder and VAE."""

    def __init__(self, transformer, scheduler):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, inputs, steps, begin=0):
        self.scheduler.set_timesteps(steps)
        timesteps = self.scheduler.timesteps
        if begin:
            self.scheduler.set_begin_index(begin)
            timesteps = timesteps[begin:]
        dense = []
        latents = inputs["hidden_states"]
        for t in timesteps:
            before = dense_calls(self.transformer)
            for _ in range(2):  # with and without guidance
                noise = output(self.transformer, inputs | {"hidden_states": latents, "timestep": t.expand(1)})
            dense.append((dense_calls(self.transformer) - before) / len(sla_layers(self.transformer)))
            latents = self.scheduler.step(noise, t, latents, return_dict=False)[0]
        return [count / 2 for count in dense]  # 1 where all calls of a step were dense


def dense_calls(model):
    return sum(layer.calls_dense["dense_steps"] for layer in sla_layers(model).values())


def pipeline(scheduler, dense_steps):
    model, inputs = make("wan")
    pipe = Pipeline(model, scheduler)
    return apply_sla(pipe, SLAConfig(**BLOCKS, dense_steps=dense_steps), strict=True), inputs


@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, DDIMScheduler])
def test_the_first_and_the_last_steps_run_dense(scheduler):
    pipe, inputs = pipeline(scheduler(), [0, 1, -1])
    assert pipe(inputs, 6) == [1, 1, 0, 0, 0, 1]
    assert pipe(inputs, 4) == [1, 1, 0, 1]  # another run counts anew


def test_steps_count_from_where_a_run_begins():
    pipe, inputs = pipeline(FlowMatchEulerDiscreteScheduler(), [0, -1])
    assert pipe(inputs, 6, begin=2) == [1, 0, 0, 1]


def test_a_scheduler_with_two_calls_a_step_counts_calls():
    pipe, inputs = pipeline(HeunDiscreteScheduler(), [1])
    assert pipe(inputs, 3) == [0, 1, 0, 0, 0]


def test_another_scheduler_is_asked_as_soon_as_it_is_there():
    pipe, inputs = pipeline(FlowMatchEulerDiscreteScheduler(), [0])
    pipe.scheduler = DDIMScheduler()
    assert pipe(inputs, 3) == [1, 0, 0]


def test_new_settings_for_the_model_alone_still_know_its_pipeline():
    pipe, inputs = pipeline(FlowMatchEulerDiscreteScheduler(), [0])
    apply_sla(pipe.transformer, SLAConfig(**BLOCKS, dense_steps=[-1]))
    assert pipe(inputs, 3) == [0, 0, 1]


@torch.no_grad()
def test_a_dense_step_is_the_native_model_and_no_refusal():
    model, inputs = make("flux")
    expected = output(model, inputs)
    apply_sla(model, SLAConfig(**BLOCKS, dense_steps=[2]), strict=True)
    with sla_step(model, 2, 4):
        assert torch.equal(output(model, inputs), expected)
    with sla_step(model, 3, 4):
        assert not torch.allclose(output(model, inputs), expected, atol=1e-4)
    assert {tuple(layer.calls_dense.items()) for layer in sla_layers(model).values()} == {(("dense_steps", 1),)}


@torch.no_grad()
def test_steps_that_nobody_counts_are_said_aloud(caplog):
    model, inputs = make("wan")
    apply_sla(model, SLAConfig(**BLOCKS, dense_steps=[0]))
    for _ in range(2):
        output(model, inputs)
    assert caplog.text.count("dense_steps has no effect") == 1
    assert "dense_steps had no effect in 2 forwards" in str(sla_report(model))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with sla_step(twin, 0, 2):
            output(twin, inputs)
        assert dense_calls(twin) == 2
    assert dense_calls(model) == 0


@pytest.mark.parametrize("way", ["whole", "regional"])
@torch.no_grad()
def test_compiled_steps_take_one_more_graph_and_no_more(way):
    torch._dynamo.reset()
    model, inputs = make("wan")
    apply_sla(model, SLAConfig(**BLOCKS, dense_steps=[0, 1, -1]))
    eager = []
    for step in range(8):
        with sla_step(model, step, 8):
            eager.append(output(model, inputs))
    counter = CompileCounterWithBackend("eager")
    if way == "whole":
        compiled = torch.compile(model, backend=counter, fullgraph=True)
    else:
        model.compile_repeated_blocks(backend=counter, fullgraph=True)
        compiled = model
    for step in range(8):
        with sla_step(model, step, 8):
            torch.testing.assert_close(output(compiled, inputs), eager[step])
    assert counter.frame_count == 2  # native: 1


@torch.no_grad()
def test_listed_layers_stay_native():
    model, _ = make("flux")
    apply_sla(model)
    apply_sla(model, SLAConfig(**BLOCKS, dense_layers=[-1]))
    assert list(sla_layers(model)) == ["transformer.transformer_blocks.0.attn"]
    assert len(sla_parameters(model)) == 2
    report = sla_report(model).layers["transformer.single_transformer_blocks.0.attn"]
    assert (report.runs, report.why) == ("native", "dense_layers")
    for way in (0, "transformer_blocks.0.attn", "transformer.transformer_blocks.0.attn"):
        apply_sla(model, SLAConfig(dense_layers=[way]))
        assert list(sla_layers(model)) == ["transformer.single_transformer_blocks.0.attn"]
    remove_sla(model)
    for wrong, message in (
        (2, "there is no layer 2; transformer has 2"), ("blocks.0.attn1", "no layer 'blocks.0.attn1'"),
    ):  # fmt: skip
        with pytest.raises(SLAConfigError, match=message):
            apply_sla(model, SLAConfig(dense_layers=[wrong]))
    with pytest.raises(SLAConfigError, match="leaves no layer"):
        apply_sla(model, SLAConfig(dense_layers=[0, 1]))
    assert not sla_layers(model)


@torch.no_grad()
def test_short_calls_run_dense():
    model, inputs = make("unet")
    expected = output(model, inputs)
    apply_sla(model, SLAConfig(**BLOCKS, min_length=100), strict=True)
    output(model, inputs)
    counts = {name: (layer.calls_sla, dict(layer.calls_dense)) for name, layer in sla_layers(model).items()}
    assert counts.pop("unet.mid_block.attentions.0.transformer_blocks.0.attn1") == (0, {"fewer than 100 tokens": 1})
    assert set(map(str, counts.values())) == {"(1, {})"}
    apply_sla(model, SLAConfig(**BLOCKS, min_length=257), strict=True)
    assert torch.equal(output(model, inputs), expected)


def test_the_schedule_is_saved_with_the_state(tmp_path):
    config = SLAConfig(**BLOCKS, dense_layers=[0, "blocks.1.attn1"], dense_steps=[0, -1], min_length=50)
    model, _ = make("wan_vace")
    apply_sla(model, config)
    torch.nn.init.normal_(sla_parameters(model)[0])
    save_sla_weights(model, tmp_path)
    again, _ = make("wan_vace")
    load_sla_weights(again, tmp_path)
    assert {layer.config for layer in sla_layers(again).values()} == {config}
    assert list(sla_layers(again)) == list(sla_layers(model))
    assert len(sla_layers(again)) == 1
    assert torch.equal(sla_parameters(again)[0], sla_parameters(model)[0])


def test_files_without_a_schedule_mean_every_layer_step_and_length():
    model, _ = make("wan")
    apply_sla(model)
    from diffusers_sla.weights import sla_state

    state = sla_state(model)
    settings = {
        key: value for key, value in state.settings.items() if key not in ("dense_layers", "dense_steps", "min_length")
    }
    again, _ = make("wan")
    load_sla_weights(again, {"format": "diffusers_sla", "version": 2, "settings": settings, "state": state.layers})
    config = next(iter(sla_layers(again).values())).config
    assert (config.dense_layers, config.dense_steps, config.min_length) == ((), (), 0)


@pytest.mark.parametrize("step", [(4, 4), (-1, 4), (0, 0), ("a", 3)])
def test_a_step_that_there_is_not_is_refused(step):
    model, _ = make("wan")
    apply_sla(model, SLAConfig(topk=0.25))
    with (
        pytest.raises(SLAConfigError, match="step must be a whole number from 0 to num_steps - 1"),
        sla_step(model, *step),
    ):
        pass
