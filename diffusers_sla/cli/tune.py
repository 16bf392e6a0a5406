"""`diffusers-sla tune`: measure tile shapes on this GPU and keep the best."""

import os

import click
import torch

from .. import tuning
from ..kernel import launch


def _blocks(_context, _parameter, values):
    pairs = []
    for value in values:
        parts = value.split("x")
        if len(parts) != 2 or any(part not in ("16", "32", "64", "128") for part in parts):
            raise click.BadParameter(f"{value!r} is not BLKQxBLKK, each 16, 32, 64 or 128, such as 64x64")
        pairs.append((int(parts[0]), int(parts[1])))
    return pairs


@click.command()
@click.option("--head-dim", "head_dims", type=click.IntRange(1, 256), multiple=True, help="Default: 64 and 128.")
@click.option("--blocks", multiple=True, callback=_blocks, metavar="BLKQxBLKK", help="Default: 64x64 and 128x64.")
@click.option("--dtype", default="bfloat16", type=click.Choice(["bfloat16", "float16", "float32"]), show_default=True)
@click.option(
    "--heads", default=8, type=click.IntRange(1), show_default=True, help="Heads of the calls that are timed."
)
@click.option("--length", default=16384, type=click.IntRange(128), show_default=True, help="Their tokens.")
@click.option("--topk", default=0.1, show_default=True, help="Their share of key blocks.")
@click.option(
    "--jobs",
    default=min(16, os.cpu_count() or 1),
    type=click.IntRange(1),
    help="Processes that compile; 0.5 GB of GPU memory each.",
)
def command(head_dims, blocks, dtype, heads, length, topk, jobs):
    """Time tile shapes of every kernel on this GPU; calls use the best from then on.

    Takes minutes per head size and pair of block sizes: every shape is compiled first, by --jobs processes. The table
    goes to $DIFFUSERS_SLA_TUNED, or beside the Hub's cache; delete the file to undo.

    \b
    Examples:
      diffusers-sla tune
      diffusers-sla tune --head-dim 128 --blocks 64x64 --length 32760 --topk 0.05
    """
    if not torch.cuda.is_available():
        raise click.ClickException("there is nothing to tune: this torch sees no GPU, and the CPU path has no tiles")
    for D in head_dims or (64, 128):
        for blkq, blkk in blocks or [(64, 64), (128, 64)]:
            calls = tuning.Calls(D, dtype, blkq, blkk, heads, length, topk)
            for result in tuning.tune("cuda", calls, jobs=jobs, on_trial=_progress):
                click.echo("\r" + " " * 60 + "\r", err=True, nl=False)
                click.echo(
                    f"{result.key.ljust(24)} {result.what.ljust(8)} {result.before:8.3f} -> {result.after:8.3f} ms, "
                    f"{result.tried} tried: {result.launch}"
                )
                for tiles in result.crashed:
                    click.echo(f"{result.key.ljust(24)} left out, it crashed: {tiles}")
                launch.save_table(torch.device("cuda", torch.cuda.current_device()))
    click.echo(f"written: {launch.table_path()}", err=True)


def _progress(key, done, total):
    click.echo(f"\r{key}: {done} of {total}", err=True, nl=False)
