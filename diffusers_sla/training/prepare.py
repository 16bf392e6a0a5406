"""From settings to what a run needs: the pipeline with SLA on it, and its batches."""

import functools
import hashlib
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..apply import apply_sla, denoisers
from ..config import SLAConfig
from ..errors import SLAConfigError, SLADataError, SLAUnsupportedError
from ..generation import Request, load_pipeline
from ..lora import lora_beside
from ..weights import load_sla_weights, settings_for
from .batches import Batch, DataBatches, RolloutBatches, Teacher
from .conditions import Conditions
from .data import Example, Order, encode_latents, save_whole
from .latents import encode_pixels
from .settings import FinetuneSettings

logger = logging.getLogger(__name__)

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def load(settings: FinetuneSettings, device: torch.device) -> tuple[Any, str, Any]:
    """The pipeline on `device`, the name of the denoiser to train, and that denoiser.

    A denoiser that is trained whole is in float32; one that is frozen, in the dtype of `mixed_precision`.

    Raises:
        SLAUnsupportedError: The model is no pipeline, or has several denoisers, or none, of that name.
        SLAConfigError: No layer of the denoiser has one of the names in `lora_target_modules`.
    """
    dtype = torch.float32 if settings.train == "full" else DTYPES[settings.mixed_precision]
    pipe = load_pipeline(settings.model, str(device), dtype)
    pipe.set_progress_bar_config(disable=True)
    models = denoisers(pipe)
    component = settings.component or next(iter(models))
    if component not in models or (settings.component is None and len(models) > 1):
        raise SLAUnsupportedError(f"component must be one of {', '.join(models)}, got {settings.component!r}")
    targets = settings.lora_target_modules
    if settings.train == "lora" and not any(  # as peft will look for them, but before the data is encoded
        f".{name}".endswith(tuple(f".{target}" for target in targets)) for name, _ in models[component].named_modules()
    ):
        raise SLAConfigError(
            f"lora_target_modules {', '.join(targets)}: {type(models[component]).__name__} has no layer of such a name"
        )
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            # In training mode DiT drops class labels of its own accord; nothing else differs in these models.
            part.eval().requires_grad_(False)
    return pipe, component, models[component]


def with_sla_config(settings: FinetuneSettings) -> FinetuneSettings:
    """`settings` with every setting of SLA: what `sla_config` names, and the rest of `sla_weights` or the defaults.

    Raises:
        SLAStateError, SLAHubError: `sla_weights` is not there or cannot be read.
        SLAConfigError: A setting is unknown or out of range.
    """
    if settings.attention_mechanism == "diffusers":
        return settings
    if settings.sla_weights is None:
        return replace(settings, sla_config=SLAConfig.parse(settings.sla_config))
    config, differing = settings_for(settings.sla_weights, settings.sla_config)
    if differing:
        logger.warning("sla_config replaces settings of %s: %s", settings.sla_weights, differing)
    return replace(settings, sla_config=config)


def install(pipe: Any, settings: FinetuneSettings) -> None:
    """Put SLA on the pipeline as the settings say; calls that it cannot serve raise."""
    if settings.attention_mechanism == "diffusers":
        return
    if settings.sla_weights is not None:
        load_sla_weights(pipe, settings.sla_weights, config=settings.sla_config, override=True, strict=True)
        lora = lora_beside(settings.sla_weights)
        if lora is not None:
            logger.warning(
                "training starts from the projections in %s, without the LoRA beside them, %s", lora.parent, lora.name
            )
    else:
        apply_sla(pipe, settings.sla_config, strict=True)


def request_for(pipe: Any, condition: str | int, **values: Any) -> Request:
    """A request for a caption or a class, whichever the pipeline takes."""
    labels = getattr(pipe, "labels", None)
    return Request(class_label=condition, **values) if labels else Request(prompt=str(condition), **values)


def batches(
    pipe: Any, component: str, settings: FinetuneSettings, examples: list[Example], order: Callable[[int], Order],
    teacher: Teacher | None, device: torch.device, on_example: Callable[[], None],
) -> Callable[[int], Batch]:  # fmt: skip
    """What gives the batch of each micro-step; encodes the data, unless that was done before.

    Raises:
        SLADataError: No file could be read.
    """
    if settings.data is None:
        assert teacher is not None
        make = functools.partial(_rollout_request, pipe, settings)
        return RolloutBatches(pipe, component, make, order(1), teacher, device)
    model = denoisers(pipe)[component]
    conditions = Conditions(pipe, component, request_for(pipe, examples[0].condition, **settings.sizes))
    height, width = _pixel_size(pipe, model, settings)
    cache = settings.output_dir / "cache"
    encoded, skipped = encode_latents(
        examples, functools.partial(encode_pixels, pipe), cache, height=height, width=width,
        num_frames=settings.num_frames, key=f"{settings.model} {dict(pipe.vae.config)}", on_example=on_example,
    )  # fmt: skip
    for one in skipped:
        logger.warning("skipped %s: %s", one.path, one.reason)
    if skipped:
        logger.warning("skipped %d of %d files", len(skipped), len(examples))
    if not encoded:
        raise SLADataError(f"none of the {len(examples)} files in {settings.data} could be read")
    captions = {
        condition: _caption(conditions, condition, settings, cache) for condition in _captions(encoded, settings)
    }
    return DataBatches(
        pipe, conditions, [path for _, path in encoded], [captions[example.condition] for example, _ in encoded],
        captions.get(None), order(len(encoded)), proportion_empty=settings.proportion_empty_prompts, device=device,
        dtype=next(model.parameters()).dtype, teacher=teacher,
    )  # fmt: skip


def _captions(encoded, settings) -> list[str | int | None]:
    seen: list[str | int | None] = [example.condition for example, _ in encoded]
    return list(dict.fromkeys([*seen, None] if settings.proportion_empty_prompts else seen))


def _caption(conditions: Conditions, condition: str | int | None, settings: FinetuneSettings, cache: Path) -> Path:
    identity = repr((settings.model, settings.sizes, settings.mixed_precision, settings.train, condition))
    path = cache / f"caption-{hashlib.sha256(identity.encode()).hexdigest()[:32]}.pt"
    if not path.is_file():
        save_whole(conditions.encode(condition), path)
    return path


def _rollout_request(pipe: Any, settings: FinetuneSettings, number: int) -> Request:
    return request_for(
        pipe, settings.prompts[number % len(settings.prompts)], seed=settings.seed + 1 + number,
        steps=settings.sampling_steps, **settings.sizes,
    )  # fmt: skip


def _pixel_size(pipe: Any, model: Any, settings: FinetuneSettings) -> tuple[int, int]:
    size = model.config.get("sample_size", None)
    side = None
    if isinstance(size, int) and hasattr(pipe.vae.config, "block_out_channels"):
        side = size * 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    height, width = settings.height or side, settings.width or side
    if height is None or width is None:
        raise SLADataError(f"{type(pipe).__name__} does not say how large its samples are; give height and width")
    return height, width
