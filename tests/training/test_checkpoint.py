import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.training_utils import EMAModel
from models import make, output
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from diffusers_sla import (
    SLAConfig,
    SLASettingsConflictError,
    SLAStateMismatchError,
    SLAStateNotFoundError,
    apply_sla,
    load_sla_weights,
    sla_layers,
    sla_parameters,
)
from diffusers_sla.training import backbone_parameters, register_sla_for_checkpointing
from diffusers_sla.weights import sla_state

accelerate = pytest.importorskip("accelerate")
CONFIG = SLAConfig(topk=0.25, blkq=16, blkk=16)


def accelerator():
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    return accelerate.Accelerator(cpu=True)


def full_hooks(accelerator, model):
    """What diffusers' fine-tuning scripts register: `save_pretrained`, and a strict `load_state_dict` of it."""

    def save(models, weights, folder):
        for _ in models:
            accelerator.unwrap_model(model).save_pretrained(Path(folder) / "transformer")
            weights.pop()

    def load(models, folder):
        while models:
            loaded = WanTransformer3DModel.from_pretrained(folder, subfolder="transformer")
            models.pop().load_state_dict(loaded.state_dict())

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def lora_hooks(accelerator, model):
    """What diffusers' LoRA scripts register: the adapter only, models of another class are refused."""

    def save(models, weights, folder):
        for one in models:
            if not isinstance(accelerator.unwrap_model(one), WanTransformer3DModel):
                raise ValueError(f"unexpected save model: {one.__class__}")
            save_file(get_peft_model_state_dict(one), Path(folder) / "lora.safetensors")
            weights.pop()

    def load(models, folder):
        while models:
            set_peft_model_state_dict(models.pop(), load_file(Path(folder) / "lora.safetensors"))

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


class Run:
    """A user's script: tiny Wan, full or LoRA, with its hooks before or after ours, or with none of its own."""

    def __init__(self, kind="full", order="before", ema=False, **settings):
        self.accelerator = accelerator()
        self.model, self.inputs = make("wan")
        apply_sla(self.model, SLAConfig(**(CONFIG.to_dict() | settings)))
        if kind == "lora":
            torch.manual_seed(0)
            self.model.requires_grad_(False)
            self.model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
            for parameter in sla_parameters(self.model):
                parameter.requires_grad_(True)
        self.model.train()
        if order == "after":
            register_sla_for_checkpointing(self.accelerator, self.model)
        if order != "none":
            (full_hooks if kind == "full" else lora_hooks)(self.accelerator, self.model)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-2)
        self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        if order != "after":
            register_sla_for_checkpointing(self.accelerator, self.model)
        self.ema = EMAModel(sla_parameters(self.model)) if ema else None
        if ema:
            self.accelerator.register_for_checkpointing(self.ema)

    def train(self, steps):
        for step in steps:
            torch.manual_seed(step)
            inputs = self.inputs | {"hidden_states": torch.randn_like(self.inputs["hidden_states"])}
            self.accelerator.backward(output(self.model, inputs).square().mean())
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.ema is not None:
                self.ema.step(sla_parameters(self.model))
        return self

    def weights(self):
        return {name: tensor.clone() for name, tensor in self.model.state_dict().items()}


@pytest.mark.parametrize("order", ["before", "after", "none"])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path, kind, order):
    through = Run(kind, order).train(range(2))
    through.accelerator.save_state(tmp_path)
    through.train(range(2, 4))
    resumed = Run(kind, order)
    resumed.accelerator.load_state(tmp_path)
    resumed.train(range(2, 4))
    weights = through.weights()
    assert weights.keys() == resumed.weights().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in resumed.weights().items())
    assert all(p.any() for p in sla_parameters(resumed.model))
    assert all(layer.calls_sla == 2 for layer in sla_layers(resumed.model).values())


def test_hedgehog_and_its_average_resume_too(tmp_path):
    through = Run(ema=True, feature_map="hedgehog").train(range(3))
    through.accelerator.save_state(tmp_path)
    through.train(range(3, 5))
    resumed = Run(ema=True, feature_map="hedgehog")
    resumed.accelerator.load_state(tmp_path)
    resumed.train(range(3, 5))
    for ours, theirs in zip(resumed.ema.shadow_params, through.ema.shadow_params, strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(through.ema.shadow_params[0], sla_parameters(through.model)[0])
    assert through.ema.optimization_step == resumed.ema.optimization_step == 5


def test_anyone_can_load_a_checkpoint(tmp_path):
    run = Run().train(range(1))
    run.accelerator.save_state(tmp_path)
    fresh = WanTransformer3DModel.from_pretrained(tmp_path, subfolder="transformer")
    load_sla_weights(fresh, tmp_path)
    for parameter in fresh.parameters():  # a file's memory is aligned otherwise, and some processors then round so
        parameter.data = parameter.data.clone()
    with torch.no_grad():
        assert torch.equal(output(fresh, run.inputs), output(run.model.eval(), run.inputs))
    assert sorted(p.name for p in tmp_path.glob("sla_attention.*")) == [
        "sla_attention.pt",
        "sla_attention.safetensors",
    ]


def test_a_checkpoint_without_the_file_says_how_to_make_one(tmp_path):
    run = Run().train(range(1))
    run.accelerator.save_state(tmp_path)
    for path in tmp_path.glob("sla_attention.*"):
        path.unlink()
    with pytest.raises(SLAStateNotFoundError, match=r"made without SLA state.* as little as one step"):
        Run().accelerator.load_state(tmp_path)


def test_a_checkpoint_that_does_not_fit_leaves_the_projections_alone(tmp_path):
    run = Run().train(range(1))
    run.accelerator.save_state(tmp_path)
    other = Run(topk=0.5).train(range(1))
    kept = [p.detach().clone() for p in sla_parameters(other.model)]
    with pytest.raises(SLASettingsConflictError, match=r"topk is 0\.25 in the file and 0\.5 here"):
        other.accelerator.load_state(tmp_path)
    one = Run()
    next(iter(sla_layers(one.model).values())).state.add_proj_s()
    with pytest.raises(SLAStateMismatchError, match=r"only one of .*blocks\.0\.attn1 and the file has proj_s"):
        one.accelerator.load_state(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(kept, sla_parameters(other.model), strict=True))
    assert not any(p.any() for p in sla_parameters(one.model)[:2])


def test_a_failed_write_leaves_the_checkpoint_that_was_there(tmp_path, monkeypatch):
    run = Run().train(range(1))
    run.accelerator.save_state(tmp_path)
    before = (tmp_path / "sla_attention.pt").read_bytes()
    run.train(range(1))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        run.accelerator.save_state(tmp_path)
    assert (tmp_path / "sla_attention.pt").read_bytes() == before
    assert not list(tmp_path.glob(".sla_attention*"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_projections_stay_float32_whatever_the_backbone_becomes(dtype):
    model, inputs = make("wan")
    apply_sla(model, CONFIG)
    model.to(dtype).train().requires_grad_(False)
    trained = sla_parameters(model)
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=dtype == torch.float16)
    inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    scaler.scale(output(model, inputs).float().square().mean()).backward()
    scaler.unscale_(optimizer)  # raises for float16 gradients
    scaler.step(optimizer)
    model.half().bfloat16().to("cpu")
    assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 and p.any() for p in trained)
    assert all(a is b for a, b in zip(sla_parameters(model), trained, strict=True))


@pytest.mark.parametrize("name", ["wan", "flux", "unet"])
def test_gradient_checkpointing_changes_no_gradient(name):
    gradients = []
    for checkpointing in (False, True):
        model, inputs = make(name)
        apply_sla(model, CONFIG)
        model.train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        output(model, inputs).square().mean().backward()
        gradients.append([p.grad for p in sla_parameters(model)])
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*gradients, strict=True))


def test_the_average_of_the_backbone_is_what_diffusers_can_save(tmp_path):
    run = Run().train(range(1))
    native, _ = make("wan")
    parameters = backbone_parameters(run.model)
    assert [p.shape for p in parameters] == [p.shape for p in native.parameters()]
    ema = EMAModel(parameters, model_cls=WanTransformer3DModel, model_config=run.model.config)
    run.train(range(1, 3))
    ema.step(backbone_parameters(run.model))
    ema.save_pretrained(tmp_path)
    saved = WanTransformer3DModel.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), ema.shadow_params, strict=True))


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    script = Path(__file__).with_name("distributed.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script, folder],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.parametrize(("kind", "sharded"), [("ddp", 0), ("fsdp2", 4)])
def test_two_processes_save_and_resume_bit_for_bit(two_processes, kind, sharded):
    ranks = [json.loads((two_processes / f"{kind}-{rank}.json").read_text()) for rank in range(2)]
    through, resumed = ranks[0]
    for run in (*ranks[0], *ranks[1]):
        assert (run["processes"], run["sharded"]) == (2, sharded)
        assert all(run["calls"])
        assert run["replayed"]
        assert run["state"] == through["state"]
    assert any(through["state"]["transformer.blocks.0.attn1.proj_l.bias"])
    model, _ = make("wan")
    load_sla_weights(model, two_processes / kind)  # after two of the four steps
    halfway = sla_state(model).layers["transformer.blocks.0.attn1"]["proj_l.bias"].tolist()
    assert any(halfway)
    assert halfway != resumed["state"]["transformer.blocks.0.attn1.proj_l.bias"]
