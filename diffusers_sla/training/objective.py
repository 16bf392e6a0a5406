"""What a denoiser is trained on: noisy samples, timesteps and targets, as its pipeline's scheduler defines them."""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor

from ..errors import SLAUnsupportedError

FLOW, NOISE = "flow", "noise"


class Objective:
    """Flow matching, or prediction of epsilon, v or the sample, read off a scheduler's config.

    kind: "flow" or "noise". prediction: "flow_prediction", "epsilon", "v_prediction" or "sample".

    Raises:
        SLAUnsupportedError: The scheduler is of neither kind.
    """

    def __init__(self, scheduler: Any):
        config = scheduler.config
        self.prediction = config.get("prediction_type", None)
        self.timesteps = config.get("num_train_timesteps", None)
        if "FlowMatch" in type(scheduler).__name__ or self.prediction == "flow_prediction":
            self.kind, self.prediction = FLOW, "flow_prediction"
            # A shift that depends on the resolution is the sampler's business alone.
            fixed = not config.get("use_dynamic_shifting", False)
            self.shift = float(config.get("shift", None) or config.get("flow_shift", None) or 1.0) if fixed else 1.0
        elif self.prediction in ("epsilon", "v_prediction", "sample") and hasattr(scheduler, "alphas_cumprod"):
            self.kind = NOISE
            names = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
            self.noising: Any = DDPMScheduler(
                num_train_timesteps=self.timesteps, prediction_type=self.prediction,
                **{name: config[name] for name in names if name in config},
            )  # fmt: skip
        else:
            raise SLAUnsupportedError(
                f"{type(scheduler).__name__} predicts {self.prediction!r}; objective 'diffusion' knows flow matching, "
                "epsilon, v_prediction and sample. Objective 'distill' without data needs none of them"
            )

    def draw(self, latents: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy latents, timesteps on the scheduler's scale [B] float32, and the target, for clean latents [B, ...].

        Flow matching: level s is a logit-normal draw, shifted as the scheduler shifts; x_s = (1 - s) x + s noise,
        target noise - x, timestep s times the number of training timesteps. Otherwise a uniform timestep.
        """
        noise = _normal(latents, generator)
        if self.kind == FLOW:
            u = torch.randn(len(latents), generator=generator).sigmoid()
            level = (self.shift * u / (1 + (self.shift - 1) * u)).clamp(1e-3, 1 - 1e-3).to(latents.device)
            noisy = torch.lerp(latents, noise, level.view(-1, *([1] * (latents.dim() - 1))))
            return noisy, level * self.timesteps, noise - latents
        steps = torch.randint(self.timesteps, (len(latents),), generator=generator).to(latents.device)
        noisy = self.noising.add_noise(latents, noise, steps)
        target = {"epsilon": noise, "sample": latents}.get(str(self.prediction))
        if target is None:
            target = self.noising.get_velocity(latents, noise, steps)
        return noisy, steps.float(), target


def sample_latents(mean: Tensor, deviation: Tensor | None, generator: torch.Generator) -> Tensor:
    """A draw of a VAE's latents."""
    return mean if deviation is None else mean + deviation * _normal(mean, generator)


def denoising_loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error in float32; of the first half of the channels where a model also predicts variances."""
    if output.shape != target.shape and output.shape[1] == 2 * target.shape[1]:
        output = output.chunk(2, 1)[0]
    return F.mse_loss(output.float(), target.float())


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    # Drawn on the CPU, so that a seed means the same on every device.
    return torch.randn(like.shape, generator=generator).to(like.device, like.dtype)
