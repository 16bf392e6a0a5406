"""What is shipped as trained is better than what is not."""

import pytest
import torch
import torch.nn.functional as F
import train_sample
from serving import MODELS

from diffusers_sla import SLAConfig
from diffusers_sla.compare import Variant
from diffusers_sla.generation import load_pipeline
from diffusers_sla.lora import LORA_NAME, lora_beside
from diffusers_sla.state import PT_NAME, SAFETENSORS_NAME, read_state
from diffusers_sla.weights import parse_settings

STATE = MODELS["sample"].state


def test_both_files_hold_the_same_and_the_lora_lies_beside_them():
    pt, safetensors = (read_state(f"{STATE}/{name}") for name in (PT_NAME, SAFETENSORS_NAME))
    assert pt.digest() == safetensors.digest()
    assert parse_settings(pt) == SLAConfig(topk=0.05)
    training = pt.meta["training"]
    assert training["train"] == "lora"
    assert training["steps"] >= 300
    assert lora_beside(STATE).name == LORA_NAME


@torch.no_grad()
def test_trained_is_nearer_to_dense_on_held_out_pixels_and_leaves_no_trace():
    skimage_data = pytest.importorskip("skimage.data")
    pipe = load_pipeline(MODELS["sample"].source, "cpu", torch.float32)
    model = pipe.transformer
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    photo = torch.from_numpy(skimage_data.coffee()).permute(2, 0, 1)
    crops, _ = train_sample.crops_of_all([photo], 1, held_out=True, seed=2)
    latents = train_sample.encode(pipe.vae, crops, 1)[0].float() * pipe.vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([pipe.labels["coffee"]])

    def outputs():
        levels = [(level, torch.lerp(latents, noise, level)) for level in (0.2, 0.5, 0.8)]
        steps = [(noisy, torch.tensor([int(1000 * level)])) for level, noisy in levels]
        return torch.cat([model(noisy, timestep=t, class_labels=labels).sample for noisy, t in steps])

    dense, config = outputs(), SLAConfig(topk=0.05)
    variants = {
        "untrained": Variant(name="untrained", config=config),
        "projections": Variant(name="projections", config=config, state=STATE),
        "trained": Variant(name="trained", config=config, state=STATE, lora=lora_beside(STATE)),
    }
    error, loss = {}, {"dense": F.mse_loss(dense, (noise - latents).expand_as(dense))}
    for name, variant in variants.items():
        with variant.installed(pipe):
            shown = outputs()
        error[name] = float((shown - dense).norm() / dense.norm())
        loss[name] = F.mse_loss(shown, (noise - latents).expand_as(dense))
    assert error["trained"] < 0.75 * error["untrained"]
    assert error["trained"] < error["projections"]  # the LoRA counts
    assert loss["trained"] - loss["dense"] < 0.25 * (loss["untrained"] - loss["dense"])
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
