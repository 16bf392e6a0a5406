"""Options that several commands share, and what they turn into."""

import functools
import importlib.util
import sys

import click
import torch
from diffusers.utils import logging
from tqdm import tqdm

from ..config import SLAConfig
from ..weights import settings_for

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def request_options(command):
    """Adds what `Request` takes, under the same names."""
    for option in (
        click.option("--num-frames", type=int, help="Frames of a video."),
        click.option("--width", type=int, help="Pixels."),
        click.option("--height", type=int, help="Pixels."),
        click.option("--guidance-scale", type=float, help="Classifier-free guidance; 1 turns it off."),
        click.option("--steps", type=int, help="Denoising steps."),
        click.option("--seed", type=int, default=0, show_default=True),
        click.option("--class-label", help="Name or number of a class, for pipelines that take one."),
        click.option("--prompt", help="Text, for pipelines that take it."),
    ):
        command = option(command)
    return command


def device_options(command):
    """Adds --device and --dtype."""
    command = click.option("--dtype", type=click.Choice(list(DTYPES)), help="Default: float32 on CPU, else bfloat16.")(
        command
    )
    return click.option("--device", help="cpu, cuda, cuda:1, mps. Default: the best there is.")(command)


def dtype_of(name: str | None) -> torch.dtype | None:
    return None if name is None else DTYPES[name]


def weights_settings(sla_weights, sla_config: str | None) -> SLAConfig:
    """The settings in `sla_weights`, but for those that `sla_config` names; says which it replaces."""
    config, differing = settings_for(sla_weights, sla_config)
    if differing:
        print(f"--sla-config replaces settings of {sla_weights}: {differing}", file=sys.stderr)
    return config


def check_unread(because: str, **options) -> None:
    """Refuse options that nothing would read.

    Raises:
        click.UsageError: One of them was given.
    """
    for name, value in options.items():
        if value is not None:
            raise click.UsageError(f"--{name.replace('_', '-')} has no meaning with {because}")


def quieten_diffusers() -> None:
    """Leave stderr to the command's own bar and errors."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def progress(pipe, total: int, name: str) -> tqdm:
    """One bar on stderr over the whole command, in place of the pipeline's own."""
    pipe.set_progress_bar_config(disable=True)
    return tqdm(total=total, desc=name, unit="step")


def check_extra(what: str, extra: str, *modules: str) -> None:
    """Refuse what needs libraries that come with an extra of the package.

    Raises:
        click.ClickException: One of them is missing.
    """
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise click.ClickException(f"{what} needs {', '.join(missing)}: pip install 'diffusers-sla[{extra}]'")


def needs_extra(extra: str, *modules: str):
    """Decorates a command whose libraries come with an extra of the package."""

    def decorate(function):
        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            check_extra("this", extra, *modules)
            return function(*args, **kwargs)

        return wrapper

    return decorate
