import pytest
import torch
from pipelines import SIZES, make_pipeline

from diffusers_sla.generation import Request
from diffusers_sla.training.calls import denoise, moved, record_calls


def request(name, **values):
    return Request(prompt="a cat", guidance_scale=1.0, **SIZES[name], **{"steps": 3} | values)


@pytest.mark.parametrize("name", ["sd", "flux", "wan", "ltx"])
def test_calls_are_recorded_and_can_be_made_again_without_decoding_anything(name, monkeypatch):
    pipe = make_pipeline(name)
    monkeypatch.setattr(pipe.vae, "decode", lambda *args, **kwargs: pytest.fail("decoded"))
    steps = []
    with record_calls(pipe, wanted=lambda: len(steps) != 1, device="cpu") as calls:
        denoise(pipe, request(name), steps.append)
    assert steps == [1, 2, 3]
    assert len(calls) == 2  # the first and the third step
    component = "unet" if name == "sd" else "transformer"
    with torch.no_grad():
        for call in calls:
            assert call.component == component
            torch.testing.assert_close(call.run(getattr(pipe, component)), call.output)
    assert not torch.equal(calls[0].output, calls[1].output)
    denoise(pipe, request(name))
    assert len(calls) == 2  # nothing is recorded outside of the block


def test_a_seed_is_a_seed():
    pipe = make_pipeline("sd")
    outputs = []
    for seed in (1, 1, 2):
        with record_calls(pipe) as calls:
            denoise(pipe, request("sd", seed=seed))
        outputs.append(calls[-1].output)
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_tensors_move_at_any_depth():
    value = {"a": [torch.ones(2), (torch.ones(1), 3)], "b": None}
    there = moved(value, "meta")
    assert there["a"][0].device.type == there["a"][1][0].device.type == "meta"
    assert (there["a"][1][1], there["b"]) == (3, None)
    assert value["a"][0].device.type == "cpu"
    assert moved(value, None)["a"][0] is value["a"][0]
