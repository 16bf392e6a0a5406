import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    KarrasVeScheduler,
    UniPCMultistepScheduler,
)
from pipelines import SIZES, make_pipeline

from diffusers_sla import SLAUnsupportedError
from diffusers_sla.training.latents import encode_pixels, pack
from diffusers_sla.training.objective import Objective, denoising_loss, sample_latents


def draw(scheduler, latents, seed=0):
    return Objective(scheduler).draw(latents, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("scheduler", "shift"),
    [
        (FlowMatchEulerDiscreteScheduler(), 1.0),
        (FlowMatchEulerDiscreteScheduler(shift=3.0), 3.0),
        (FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True), 1.0),
        (UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0), 5.0),
        (DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True), 1.0),
    ],
)
def test_flow_matching_is_what_the_scheduler_undoes(scheduler, shift):
    latents = torch.randn(4000, 2, 1, 1)
    noisy, timestep, target = draw(scheduler, latents)
    level = (timestep / 1000).view(-1, 1, 1, 1)
    torch.testing.assert_close(noisy - level * target, latents, rtol=1e-4, atol=1e-4)  # x_s - s v = x_0
    torch.testing.assert_close(noisy + (1 - level) * target, latents + target, rtol=1e-4, atol=1e-4)
    assert level.median().item() == pytest.approx(shift / (1 + shift), abs=0.03)
    assert 0 < level.min() < level.max() < 1


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_noise_prediction_is_what_the_scheduler_undoes(prediction):
    scheduler = DDIMScheduler(prediction_type=prediction, beta_schedule="scaled_linear", clip_sample=False)
    scheduler.set_timesteps(1000)
    latents = torch.randn(64, 2, 3, 3)
    noisy, timestep, target = draw(scheduler, latents)
    assert timestep.min() < 150 < 850 < timestep.max()
    for i in range(0, 64, 8):
        back = scheduler.step(target[i], int(timestep[i]), noisy[i]).pred_original_sample
        torch.testing.assert_close(back, latents[i], rtol=1e-2, atol=2e-3)


def test_draws_follow_the_generator_and_nothing_else():
    latents = torch.randn(4, 2, 3, 3)
    first, again, other = (draw(FlowMatchEulerDiscreteScheduler(), latents, seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    generator = torch.Generator().manual_seed(0)
    drawn = sample_latents(latents, torch.full_like(latents, 0.5), generator)
    expected = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn, latents + 0.5 * expected)
    assert sample_latents(latents, None, generator) is latents


def test_a_scheduler_of_another_kind_is_refused():
    with pytest.raises(SLAUnsupportedError, match="KarrasVeScheduler predicts None"):
        Objective(KarrasVeScheduler())
    assert Objective(CogVideoXDDIMScheduler(prediction_type="v_prediction")).prediction == "v_prediction"


def test_the_loss_leaves_out_predicted_variances():
    target, variance = torch.randn(2, 1, 4, 8, 8)
    output = torch.cat([target + 2, variance], 1)
    assert denoising_loss(output, target).item() == pytest.approx(4, rel=1e-5)
    assert denoising_loss((target + 1).bfloat16(), target).dtype == torch.float32


@pytest.mark.parametrize("name", ["dit", "sd", "flux", "wan"])
@torch.no_grad()
def test_latents_decode_to_the_pixels_they_came_from(name):
    """Scaling and packing, undone the pipeline's own way, give the VAE's own reconstruction."""
    pipe = make_pipeline(name)
    sizes = {"height": 32, "width": 32} | SIZES[name]
    shape = (1, 3, *([5] if name == "wan" else []), sizes["height"], sizes["width"])
    pixels = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = pipe.vae.decode(pipe.vae.encode(pixels).latent_dist.mean).sample
    mean, deviation = encode_pixels(pipe, pixels)
    assert (deviation > 0).all()
    if name == "flux":
        packed = pack(pipe, mean, (64, 4))
        unpacked = pipe._unpack_latents(packed, 32, 32, pipe.vae_scale_factor)
        latents = unpacked / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    elif name == "wan":
        latents = pack(pipe, mean, tuple(mean.shape[1:])) * 0.5 + 0.1
    else:
        latents = mean / pipe.vae.config.scaling_factor + 0.1  # the shift that the tiny VAE has
    torch.testing.assert_close(pipe.vae.decode(latents).sample, expected, rtol=1e-4, atol=1e-4)


def test_latents_of_another_shape_are_refused():
    with pytest.raises(SLAUnsupportedError, match=r"samples of shape \(64, 8\)"):
        pack(make_pipeline("flux"), torch.randn(1, 1, 16, 16), (64, 8))
