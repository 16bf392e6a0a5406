"""FinetuneSettings: everything `finetune` can be told, validated once."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..config import SLAConfig
from ..errors import SLAConfigError

TRAIN_MODES = ("projection", "lora", "full")
OBJECTIVES = ("diffusion", "distill")
MECHANISMS = ("sla", "diffusers")
PRECISIONS = ("no", "fp16", "bf16")
LR_SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings:
    """Settings of a fine-tuning run; names as diffusers' training scripts have them.

    Args:
        model: A pipeline: a folder or the id of a Hub repository.
        output_dir: Receives checkpoints, the result, logs, validation pictures and a cache of encoded data.
        data: A folder of images, videos or latents, see `data.py`. None only for objective "distill" with prompts.
        caption_column: Key of the caption in metadata.jsonl.
        prompts: Texts or classes that objective "distill" without data generates from.
        component: Which denoiser, where a pipeline has several.
        attention_mechanism: "sla", or "diffusers": the model's own attention, to compare with.
        sla_config: Settings of SLA. Those that a dict or JSON text does not name are those of `sla_weights`, or the
            defaults.
        sla_weights: A state file or folder to start the projections from, such as a calibration's.
        train: "projection": SLA's weights alone; "lora": a low-rank adapter too; "full": the whole denoiser.
        objective: "diffusion": what the pipeline's scheduler defines; "distill": the dense model's own output.
        learning_rate: Of the denoiser or its adapter. projection_learning_rate: of SLA's weights.
        max_train_steps: Optimizer steps, those of the run that is resumed included.
        validation_prompts, validation_steps: Pictures dense and SLA of these prompts or classes, every so many steps.
        resume: "latest", or a checkpoint folder.

    Raises:
        SLAConfigError: A value is out of range, or two contradict; names them and what is allowed.
    """

    model: str
    output_dir: Path
    data: Path | None = None
    caption_column: str = "text"
    prompts: tuple[str, ...] = ()
    component: str | None = None
    attention_mechanism: str = "sla"
    sla_config: SLAConfig | Mapping[str, Any] | str | None = None
    sla_weights: str | None = None
    train: str = "full"
    objective: str = "diffusion"
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    guidance_scale: float | None = None
    sampling_steps: int = 20
    train_batch_size: int = 1
    gradient_accumulation_steps: int = 1
    max_train_steps: int = 1000
    learning_rate: float = 1e-5
    projection_learning_rate: float = 1e-3
    lr_scheduler: str = "constant"
    lr_warmup_steps: int = 0
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    rank: int = 16
    lora_target_modules: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    use_ema: bool = False
    ema_decay: float = 0.999
    gradient_checkpointing: bool = False
    mixed_precision: str = "no"
    proportion_empty_prompts: float = 0.0
    checkpointing_steps: int = 500
    checkpoints_total_limit: int = 2
    validation_prompts: tuple[str, ...] = ()
    validation_steps: int = 500
    resume: str | None = None
    seed: int = 0
    report_to: str = "tensorboard"
    cpu: bool = False
    sizes: dict[str, Any] = field(init=False, repr=False)

    def __post_init__(self):
        for name, choices in (
            ("train", TRAIN_MODES), ("objective", OBJECTIVES), ("attention_mechanism", MECHANISMS),
            ("mixed_precision", PRECISIONS), ("lr_scheduler", LR_SCHEDULERS), ("report_to", ("tensorboard", "none")),
        ):  # fmt: skip
            if getattr(self, name) not in choices:
                raise SLAConfigError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name in (
            "train_batch_size", "gradient_accumulation_steps", "max_train_steps", "rank", "checkpointing_steps",
            "checkpoints_total_limit", "validation_steps", "sampling_steps",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise SLAConfigError(f"{name} must be 1 or more, got {getattr(self, name)}")
        for name in ("learning_rate", "projection_learning_rate", "max_grad_norm"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise SLAConfigError(f"{name} must be a number above 0, got {getattr(self, name)}")
        for name in ("proportion_empty_prompts", "ema_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise SLAConfigError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if self.data is None and self.objective == "diffusion":
            raise SLAConfigError("objective 'diffusion' needs data; 'distill' can do with prompts")
        if self.data is None and not self.prompts:
            raise SLAConfigError("objective 'distill' needs data or prompts")
        if self.data is not None and self.prompts:
            raise SLAConfigError("data and prompts exclude each other: captions come with the data")
        if self.attention_mechanism == "diffusers":
            if self.train == "projection":
                raise SLAConfigError("attention_mechanism 'diffusers' has no projection; train 'full' or 'lora'")
            if self.sla_config is not None or self.sla_weights is not None:
                raise SLAConfigError("attention_mechanism 'diffusers' takes neither sla_config nor sla_weights")
        names = ("height", "width", "num_frames", "guidance_scale")
        object.__setattr__(self, "sizes", {name: getattr(self, name) for name in names})

    def to_dict(self) -> dict[str, Any]:
        """Plain values of every setting, as `training.json` has them."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        if isinstance(self.sla_config, SLAConfig):
            values["sla_config"] = asdict(self.sla_config)
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
