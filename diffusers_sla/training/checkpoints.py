"""The checkpoint folders of a run: saved whole or not at all, found again, and the old ones removed."""

import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..errors import SLADataError, SLATrainingError

logger = logging.getLogger(__name__)

RECORD = "training.json"
# What a resumed run must share with the one that saved, or its next step would not be that run's next step.
SAME = (
    "model", "component", "attention_mechanism", "train", "objective", "rank", "lora_target_modules", "seed",
    "train_batch_size", "gradient_accumulation_steps", "use_ema",
)  # fmt: skip


class Checkpoints:
    """`checkpoint-<step>` folders below `folder`; the newest `limit` of them are kept."""

    def __init__(self, accelerator: Any, folder: Path, settings: dict[str, Any], limit: int):
        self.accelerator, self.folder, self.settings, self.limit = accelerator, folder, settings, limit

    def all(self) -> list[tuple[int, Path]]:
        """Step and folder of those that are whole, the oldest first."""
        found = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in self.folder.glob("checkpoint-*")]
        return sorted((int(match[1]), path) for match, path in found if match and (path / RECORD).is_file())

    def newest(self) -> str:
        """The last whole checkpoint, for messages."""
        whole = self.all()
        return str(whole[-1][1]) if whole else "none was saved yet"

    def save(self, step: int) -> bool:
        """Save one beside its final name, then put it there; what was there before stays until then.

        False where it could not be written, a full disk for example: that is logged, and the run goes on.
        """
        partial, final = self.folder / f"partial-{step}", self.folder / f"checkpoint-{step}"
        error: Exception | None = None
        try:
            self.accelerator.save_state(str(partial))
            if self.accelerator.is_main_process:
                record = json.dumps({"step": step, "settings": self.settings}, indent=2)
                (partial / RECORD).write_text(record + "\n")
        except (OSError, RuntimeError, SafetensorError) as failure:
            # torch.save tells of a full disk by a RuntimeError of its writer.
            if type(failure) is RuntimeError and "inline_container" not in str(failure):
                raise
            error = failure
        failed = self.accelerator.gather(torch.tensor([error is not None], device=self.accelerator.device))
        if self.accelerator.is_main_process:
            if failed.any():
                shutil.rmtree(partial, ignore_errors=True)
                logger.error(
                    "checkpoint-%d could not be saved: %s. Training goes on; the last good checkpoint: %s",
                    step, error or "see the other processes", self.newest(),
                )  # fmt: skip
            else:
                if final.exists():
                    shutil.rmtree(final)
                os.replace(partial, final)
                for _, old in self.all()[: -self.limit]:
                    shutil.rmtree(old)
        self.accelerator.wait_for_everyone()
        return not failed.any()

    def find(self, which: str) -> Path | None:
        """The checkpoint to go on from, "latest" or a folder; None where there is no latest.

        Raises:
            SLADataError: There is no such checkpoint.
            SLATrainingError: It belongs to a run with other settings; names them.
        """
        if which == "latest":
            whole = self.all()
            if not whole:
                logger.warning("there is no checkpoint in %s yet: the run starts from the beginning", self.folder)
                return None
            path = whole[-1][1]
        else:
            path = Path(which)
        if not (path / RECORD).is_file():
            raise SLADataError(f"{path} is no checkpoint of a fine-tuning run: it has no {RECORD}")
        there, here = _record(path)["settings"], json.loads(json.dumps(self.settings))
        differing = [f"{name} was {there[name]!r} and is {here[name]!r}" for name in SAME if there[name] != here[name]]
        before, now = there["sla_config"] or {}, here["sla_config"] or {}
        differing += [
            f"{name} of sla_config was {before[name]!r} and is {now[name]!r}"
            for name in now
            if before.get(name, now[name]) != now[name]
        ]
        if differing:
            raise SLATrainingError(
                f"{path} cannot be resumed: {'; '.join(differing)}. A run goes on with the settings it had: give "
                "those, or begin another one in a new output_dir"
            )
        return path

    def load(self, path: Path) -> int:
        """Put the state of a checkpoint back; the step it was saved at."""
        self.accelerator.load_state(str(path))
        return _record(path)["step"]


def _record(path: Path) -> dict[str, Any]:
    return json.loads((path / RECORD).read_text())
