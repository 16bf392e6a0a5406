import pytest
import torch
from pipelines import SIZES, make_pipeline

from diffusers_sla import SLAUnsupportedError
from diffusers_sla.generation import Request
from diffusers_sla.training.conditions import Conditions


def conditions(name, **values):
    pipe = make_pipeline(name)
    component = "unet" if name == "sd" else "transformer"
    what = {"class_label": "dog"} if name == "dit" else {"prompt": "a cat"}
    return pipe, Conditions(pipe, component, Request(**what, **SIZES[name], **values))


@pytest.mark.parametrize(
    ("name", "sample", "shape", "scale", "names"),
    [
        ("dit", "hidden_states", (4, 16, 16), 1.0, {"class_labels"}),
        ("sd", "sample", (4, 16, 16), 1.0, {"encoder_hidden_states"}),
        (
            "flux",
            "hidden_states",
            (64, 4),
            1e-3,
            {"encoder_hidden_states", "pooled_projections", "txt_ids", "img_ids"},
        ),
        ("wan", "hidden_states", (4, 2, 8, 8), 1.0, {"encoder_hidden_states"}),
    ],
)
def test_a_pipelines_own_call_says_what_its_denoiser_takes(name, sample, shape, scale, names):
    _, learned = conditions(name)
    assert (learned.sample_name, learned.timestep_name) == (sample, "timestep")
    assert learned.sample_shape == shape
    assert learned.timestep_scale == scale
    one = learned.encode("dog" if name == "dit" else "a blue dog")
    assert names <= {key for key, value in one.items() if isinstance(value, torch.Tensor)}


@pytest.mark.parametrize("name", ["dit", "sd", "flux", "wan"])
def test_a_batch_is_what_the_pipeline_makes_of_several_prompts(name):
    pipe, learned = conditions(name)
    prompts = ["cat", "dog"] if name == "dit" else ["a red cat", "photo of a dog"]
    joined = learned.join([learned.encode(prompt) for prompt in prompts])
    seen = {}

    def keep(module, args, kwargs):
        seen.update(kwargs)

    model = pipe.unet if name == "sd" else pipe.transformer
    model.register_forward_pre_hook(keep, with_kwargs=True)
    what = {"class_labels": [0, 1]} if name == "dit" else {"prompt": prompts}
    pipe(**what, num_inference_steps=2, guidance_scale=1.0, **SIZES[name])
    for key in ("encoder_hidden_states", "class_labels", "pooled_projections", "txt_ids", "img_ids"):
        if key in seen:
            torch.testing.assert_close(joined[key], seen[key])


def test_no_condition_is_the_empty_prompt_or_no_class():
    _, learned = conditions("dit")
    assert learned.encode(None)["class_labels"].tolist() == [10]
    pipe, learned = conditions("sd")
    empty = learned.encode(None)["encoder_hidden_states"]
    torch.testing.assert_close(empty, pipe.encode_prompt("", pipe.device, 1, False)[0])
    assert not torch.equal(empty, learned.encode("a cat")["encoder_hidden_states"])


def test_embedded_guidance_is_an_input_of_the_model():
    for scale, expected in ((3.5, 3.5), (None, 1.0)):
        pipe = make_pipeline("flux")
        pipe.transformer.register_to_config(guidance_embeds=True)
        learned = Conditions(pipe, "transformer", Request(prompt="a cat", guidance_scale=scale, **SIZES["flux"]))
        assert learned.encode("a cat")["guidance"].tolist() == [expected]


def test_captions_of_other_lengths_need_batches_of_one():
    _, learned = conditions("wan")
    one, other = learned.encode("a"), learned.encode("a")
    other["encoder_hidden_states"] = other["encoder_hidden_states"][:, :5]
    with pytest.raises(SLAUnsupportedError, match=r"encoder_hidden_states of shapes \(1, .* use batches of 1"):
        learned.join([one, other])


def test_timesteps_that_nobody_knows_are_refused():
    pipe = make_pipeline("wan")
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs | {"timestep": 1 - kwargs["timestep"] / 1000}), with_kwargs=True
    )
    with pytest.raises(SLAUnsupportedError, match=r"passes timestep .* objective 'distill'"):
        Conditions(pipe, "transformer", Request(prompt="a", **SIZES["wan"]))
