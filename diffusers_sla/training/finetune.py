"""The training loop of `diffusers-sla finetune`."""

import contextlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from tqdm import tqdm

from ..apply import sla_disabled, sla_layers, sla_step
from ..errors import SLADataError, SLATrainingError, SLAUnsupportedError
from ..generation import generate
from ..weights import save_sla_weights
from . import prepare
from .batches import Teacher
from .calls import first
from .checkpoint import register_sla_for_checkpointing
from .checkpoints import RECORD, Checkpoints
from .data import Order, scan_folder
from .objective import denoising_loss
from .settings import FinetuneSettings
from .trained import Trained

logger = logging.getLogger(__name__)

# None that `dense_steps` could name: those are for sampling, what trains is SLA.
NO_STEP = (1_000_000, 2_000_000)


@dataclass
class FinetuneResult:
    """folder: holds the result. step: optimizer steps done, of this run or the one resumed. loss: mean of the last
    100 steps. seconds: of this run's training. resumed_from: the step it went on from."""

    folder: Path
    step: int
    loss: float
    seconds: float
    resumed_from: int


def finetune(settings: FinetuneSettings) -> FinetuneResult:
    """Train a pipeline's denoiser with SLA; `settings.output_dir` receives the result and the checkpoints.

    Runs in one process, or in each of those that `accelerate launch` starts (DDP).

    Raises:
        SLADataError: The data is missing or wrong; before any model is loaded where that can be seen. So is a
            checkpoint to resume, and an output_dir with another run in it, unless that is resumed.
        SLAStateError, SLAHubError: sla_weights is not there or cannot be read, likewise.
        SLAUnsupportedError: SLA cannot serve this model, or the pipeline cannot be trained this way.
        SLATrainingError: The checkpoint to resume has other settings: names them. Or the loss or the gradient became
            NaN or infinite: names the step and the last checkpoint.
    """
    settings = prepare.with_sla_config(settings)
    examples = [] if settings.data is None else scan_folder(settings.data, settings.caption_column)
    out = settings.output_dir
    if settings.resume is None and ((out / RECORD).is_file() or any(out.glob("checkpoint-*"))):
        raise SLADataError(
            f"output_dir {out} holds another run: go on with it by --resume, or give this one a new folder"
        )
    accelerator = Accelerator(
        cpu=settings.cpu, mixed_precision=settings.mixed_precision, project_dir=settings.output_dir / "logs",
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        log_with=None if settings.report_to == "none" else settings.report_to,
        # Layers of few tokens run dense, and their projections get no gradient.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )  # fmt: skip
    if accelerator.distributed_type.value not in ("NO", "MULTI_GPU", "MULTI_CPU", "MULTI_XPU", "MULTI_NPU"):
        raise SLAUnsupportedError(
            f"finetune runs in one process or under DDP, not {accelerator.distributed_type.value}; "
            "register_sla_for_checkpointing puts SLA into a script of your own under FSDP2"
        )
    checkpoints = Checkpoints(accelerator, out, settings.to_dict(), settings.checkpoints_total_limit)
    begin = checkpoints.find(settings.resume) if settings.resume else None
    out.mkdir(parents=True, exist_ok=True)
    set_seed(settings.seed)
    return _Run(settings, accelerator, examples, checkpoints).train(begin)


class _Run:
    def __init__(self, settings: FinetuneSettings, accelerator: Accelerator, examples: list, checkpoints: Checkpoints):
        self.settings, self.accelerator, self.checkpoints = settings, accelerator, checkpoints
        self.pipe, self.component, model = prepare.load(settings, accelerator.device)
        teacher = None
        if settings.objective == "distill":
            teacher = Teacher(self.pipe, self.component, model, settings.train == "full")
        if settings.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        main = accelerator.is_main_process

        def order(count):
            return Order(
                count, settings.train_batch_size, settings.seed, accelerator.process_index, accelerator.num_processes
            )

        with accelerator.main_process_first(), accelerator.autocast(), tqdm(
            total=len(examples), desc="encode", disable=not main
        ) as bar:  # fmt: skip
            self.batch = prepare.batches(
                self.pipe, self.component, settings, examples, order, teacher, accelerator.device, bar.update
            )
        prepare.install(self.pipe, settings)
        self.trained = Trained(
            model, self.component, settings.train, rank=settings.rank, targets=settings.lora_target_modules,
            seed=settings.seed,
        )  # fmt: skip
        self._rest_to("cpu" if settings.data is not None else accelerator.device)
        self.inner = model
        groups = [
            {"params": parameters, "lr": rate}
            for parameters, rate in (
                (self.trained.backbone, settings.learning_rate),
                (self.trained.projections, settings.projection_learning_rate),
            )
            if parameters
        ]
        optimizer = torch.optim.AdamW(groups, weight_decay=settings.weight_decay)
        self.schedule = get_scheduler(
            settings.lr_scheduler, optimizer, num_warmup_steps=settings.lr_warmup_steps,
            num_training_steps=settings.max_train_steps,
        )  # fmt: skip
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.ema = EMAModel(self.trained.parameters(), decay=settings.ema_decay) if settings.use_ema else None
        self._register()

    def _register(self) -> None:
        """What a checkpoint holds besides accelerate's own: the weights that are trained, SLA, schedule, average."""

        def save(models, weights, folder):
            weights.clear()
            if self.accelerator.is_main_process:
                self.trained.save(folder)

        def load(models, folder):
            models.clear()
            self.trained.load(folder)

        self.accelerator.register_save_state_pre_hook(save)
        self.accelerator.register_load_state_pre_hook(load)
        if sla_layers(self.pipe):
            register_sla_for_checkpointing(self.accelerator, self.pipe)
        self.accelerator.register_for_checkpointing(self.schedule)
        if self.ema is not None:
            self.ema.to(self.accelerator.device)
            self.accelerator.register_for_checkpointing(self.ema)

    def train(self, begin: Path | None) -> FinetuneResult:
        """`begin`: the checkpoint to go on from."""
        settings, accelerator = self.settings, self.accelerator
        begun = 0 if begin is None else self.checkpoints.load(begin)
        if self.ema is not None:
            self.ema.to(accelerator.device)
        if settings.report_to != "none":
            values = {k: v if isinstance(v, int | float | str) else str(v) for k, v in settings.to_dict().items()}
            accelerator.init_trackers("finetune", config=values)
        started, saved = time.monotonic(), True
        recent: list[float] = []
        steps = range(begun + 1, settings.max_train_steps + 1)
        with tqdm(
            total=settings.max_train_steps, initial=begun, desc="train", unit="step",
            disable=not accelerator.is_main_process,
        ) as bar:  # fmt: skip
            for step in steps:
                loss, norm = self._step(step)
                recent = [*recent[-99:], loss]
                bar.update()
                bar.set_postfix(loss=f"{loss:.4f}", lr=f"{self.schedule.get_last_lr()[0]:.1e}")
                rates = {f"lr/{i}": rate for i, rate in enumerate(self.schedule.get_last_lr())}
                accelerator.log({"loss": loss, "grad_norm": norm, **rates}, step=step)
                last = step == settings.max_train_steps
                if settings.validation_prompts and (last or step % settings.validation_steps == 0):
                    self._validate(step)
                if last or step % settings.checkpointing_steps == 0:
                    saved = self.checkpoints.save(step)
        seconds = time.monotonic() - started
        if accelerator.is_main_process:
            self._write_result(max(begun, settings.max_train_steps))
        accelerator.wait_for_everyone()
        accelerator.end_training()
        if not saved:
            raise SLATrainingError(
                f"the last checkpoint could not be saved; the result is in {settings.output_dir}, "
                f"the last checkpoint is {self.checkpoints.newest()}"
            )
        mean = sum(recent) / len(recent) if recent else math.nan
        return FinetuneResult(settings.output_dir, max(begun, settings.max_train_steps), mean, seconds, begun)

    def _step(self, step: int) -> tuple[float, float]:
        """One optimizer step; loss, over all processes, and gradient norm."""
        settings, accelerator = self.settings, self.accelerator
        micro_steps = settings.gradient_accumulation_steps
        total = torch.zeros((), device=accelerator.device)
        for i in range(micro_steps):
            with accelerator.autocast():  # the teacher's precision is the student's
                batch = self.batch((step - 1) * micro_steps + i)
            with accelerator.accumulate(self.model):
                with accelerator.autocast(), sla_step(self.pipe, *NO_STEP):
                    loss = denoising_loss(first(self.model(*batch.args, **batch.kwargs)), batch.target)
                total += loss.detach() / micro_steps
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self.trained.parameters(), settings.max_grad_norm)
                    value, size = accelerator.reduce(torch.stack([total, norm.to(total.device)]), "mean").tolist()
                    # A GradScaler finds its scale by running into infinity.
                    fine = math.isfinite(value) and (math.isfinite(size) or accelerator.scaler is not None)
                    if not fine:
                        accelerator.end_training()
                        raise SLATrainingError(
                            f"the {'gradient' if math.isfinite(value) else 'loss'} is no longer finite at step {step} "
                            f"(loss {value}); the last good checkpoint: {self.checkpoints.newest()}"
                        )
                self.optimizer.step()
                self.optimizer.zero_grad()
        self.schedule.step()
        if self.ema is not None:
            self.ema.step(self.trained.parameters())
        return value, size

    @torch.no_grad()
    def _validate(self, step: int) -> None:
        """A picture per prompt, dense left and SLA right, into `validation/` and the log."""
        if self.accelerator.is_main_process:
            self._rest_to(self.accelerator.device)
            rows = []
            with torch.random.fork_rng(), self.accelerator.autocast(), self._averaged():
                for prompt in self.settings.validation_prompts:
                    request = prepare.request_for(
                        self.pipe, prompt, seed=self.settings.seed, steps=self.settings.sampling_steps,
                        **self.settings.sizes,
                    )  # fmt: skip
                    with sla_disabled(self.pipe):
                        pair = [_picture(generate(self.pipe, request).frames)]
                    if sla_layers(self.pipe):
                        pair.append(_picture(generate(self.pipe, request).frames))
                    rows.append(pair)
            width, height = rows[0][0].size
            sheet = Image.new("RGB", (width * len(rows[0]), height * len(rows)))
            for y, row in enumerate(rows):
                for x, picture in enumerate(row):
                    sheet.paste(picture, (x * width, y * height))
            folder = self.settings.output_dir / "validation"
            folder.mkdir(exist_ok=True)
            sheet.save(folder / f"step-{step:06d}.png")
            for tracker in self.accelerator.trackers:
                tracker.writer.add_image("validation/dense, sla", np.asarray(sheet), step, dataformats="HWC")
            self._rest_to("cpu" if self.settings.data is not None else self.accelerator.device)
        self.accelerator.wait_for_everyone()

    @contextlib.contextmanager
    def _averaged(self) -> Iterator[None]:
        """The model has its averaged weights inside the block, where an average is kept."""
        if self.ema is None:
            yield
            return
        self.ema.store(self.trained.parameters())
        self.ema.copy_to(self.trained.parameters())
        try:
            yield
        finally:
            self.ema.restore(self.trained.parameters())

    def _write_result(self, step: int) -> None:
        """Written beside what an earlier run left, then put in its place."""
        partial = self.settings.output_dir / "partial-result"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        with self._averaged():
            self.trained.save(partial)
            if sla_layers(self.pipe):
                save_sla_weights(self.pipe, partial, meta={"training": self._for_the_card(step)})
        record = json.dumps({"step": step, "settings": self.settings.to_dict()}, indent=2)
        (partial / RECORD).write_text(record + "\n")
        for path in partial.iterdir():
            final = self.settings.output_dir / path.name
            if final.is_dir():
                shutil.rmtree(final)
            os.replace(path, final)
        partial.rmdir()

    def _for_the_card(self, step: int) -> dict[str, Any]:
        """What the model card tells of a run; no paths and no prompts."""
        told = (
            "train", "objective", "train_batch_size", "gradient_accumulation_steps", "learning_rate",
            "projection_learning_rate", "lr_scheduler", "mixed_precision", "use_ema", "seed", "height", "width",
            "num_frames",
        )  # fmt: skip
        settings = self.settings.to_dict()
        return {"steps": step} | {name: settings[name] for name in told if settings[name] is not None}

    def _rest_to(self, device: torch.device | str) -> None:
        """Everything but the denoiser: encoders and decoders are idle while a run trains on encoded data."""
        for name, part in self.pipe.components.items():
            if isinstance(part, torch.nn.Module) and name != self.component:
                part.to(device)


def _picture(frames: list[Image.Image]) -> Image.Image:
    """The middle frame."""
    frame = frames[len(frames) // 2]
    return (
        frame if isinstance(frame, Image.Image) else Image.fromarray((np.asarray(frame) * 255).round().astype("uint8"))
    )
