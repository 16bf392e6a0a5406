import pytest
import torch
from models import make, output
from peft.tuners.lora import LoraLayer
from pipelines import SIZES, make_pipeline

from diffusers_sla import apply_sla, sla_parameters
from diffusers_sla.generation import Request
from diffusers_sla.training.batches import DataBatches, RolloutBatches, Teacher
from diffusers_sla.training.conditions import Conditions
from diffusers_sla.training.data import Order, save_whole
from diffusers_sla.training.trained import Trained


@pytest.mark.parametrize("mode", ["full", "lora", "projection"])
@torch.no_grad()
def test_the_teacher_is_the_model_as_it_was(mode):
    model, inputs = make("wan")
    native = output(model, inputs)
    pipe = make_pipeline("wan")
    pipe.transformer = model
    teacher = Teacher(pipe, "transformer", model, mode == "full")
    apply_sla(model, {"topk": 0.25, "blkq": 16, "blkk": 16}, strict=True)
    trained = Trained(model, "transformer", mode, rank=2, targets=("to_q", "to_v"), seed=0)
    for parameter in trained.parameters():
        parameter.normal_(std=0.2)
    changed = output(model, inputs)
    assert not torch.allclose(changed, native, atol=1e-2)
    with teacher.teaching() as teaching:
        assert pipe.transformer is teaching
        assert torch.equal(output(teaching, inputs), native)
    assert pipe.transformer is model
    assert torch.equal(output(model, inputs), changed)
    assert all(parameter.requires_grad for parameter in trained.parameters())
    assert sum(isinstance(module, LoraLayer) for module in model.modules()) == (8 if mode == "lora" else 0)


def data_batches(name, tmp_path, **values):
    pipe = make_pipeline(name)
    what = {"class_label": "cat"} if name == "dit" else {"prompt": "a cat"}
    conditions = Conditions(pipe, "transformer", Request(**what, **SIZES[name]))
    paths = [tmp_path / f"{i}.pt" for i in range(3)]
    shape = (4, 16, 16) if name == "dit" else (1, 16, 16)
    for i, path in enumerate(paths):
        save_whole({"mean": torch.full(shape, 10.0 * (i + 1))}, path)
    captions = [tmp_path / f"c{i}.pt" for i in range(3)]
    for condition, path in zip(("cat", "dog", None), captions, strict=True):
        save_whole(conditions.encode(condition), path)
    values = {"proportion_empty": 0.0, "teacher": None} | values
    return DataBatches(
        pipe, conditions, paths, [captions[0], captions[1], captions[1]], captions[2], Order(3, 2, seed=0),
        device=torch.device("cpu"), dtype=torch.float32, **values,
    )  # fmt: skip


@pytest.mark.parametrize(("name", "largest"), [("dit", 1000), ("flux", 1)])
def test_a_batch_has_noisy_latents_with_their_timesteps_and_captions(tmp_path, name, largest):
    batches = data_batches(name, tmp_path)
    seen = []
    for micro_step in range(30):
        batch = batches(micro_step)
        level = batch.kwargs["timestep"].double() / largest
        assert ((level >= 0) & (level <= 1)).all()
        seen += level.tolist()
        for i, index in enumerate(batches.order.indices(micro_step)):
            clean = batch.kwargs["hidden_states"][i] - level[i] * batch.target[i]
            torch.testing.assert_close(clean, torch.full_like(clean, 10.0 * (index + 1)), rtol=0, atol=0.1)
            if name == "dit":
                assert batch.kwargs["class_labels"][i] == (0 if index == 0 else 1)
    assert max(seen) > 0.8
    again = batches(7)
    assert torch.equal(again.target, batches(7).target)
    assert not torch.equal(again.target, batches(8).target)


def test_captions_are_dropped_at_the_rate_asked_for(tmp_path):
    batches = data_batches("dit", tmp_path, proportion_empty=0.25)
    labels = torch.cat([batches(i).kwargs["class_labels"] for i in range(100)])
    assert (labels == 10).float().mean().item() == pytest.approx(0.25, abs=0.08)


def test_rollouts_are_the_calls_of_the_dense_pipeline_in_another_order():
    pipe = make_pipeline("wan")

    def request(number):
        return Request(prompt="a cat", seed=number, steps=4, guidance_scale=1.0, **SIZES["wan"])

    teacher = Teacher(pipe, "transformer", pipe.transformer, False)
    batches = RolloutBatches(pipe, "transformer", request, Order(1, 1, seed=0), teacher, torch.device("cpu"))
    assert batches.per_rollout == 4
    taken = [batches(i) for i in range(8)]
    steps = [int(batch.kwargs["timestep"].flatten()[0]) for batch in taken]
    assert sorted(steps[:4]) == sorted(steps[4:]) == sorted(pipe.scheduler.timesteps.tolist())
    assert steps[:4] != sorted(steps[:4], reverse=True) or steps[4:] != sorted(steps[4:], reverse=True)
    with torch.no_grad():
        for batch in taken[::3]:
            torch.testing.assert_close(pipe.transformer(*batch.args, **batch.kwargs)[0], batch.target)
    first = next(i for i in range(4) if steps[i] == max(steps))
    assert not torch.equal(taken[first].kwargs["hidden_states"], taken[4].kwargs["hidden_states"])
    assert sla_parameters(pipe) == []
