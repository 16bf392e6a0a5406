"""`diffusers-sla pull`: a state file from the Hub, checked."""

import shutil
from pathlib import Path

import click

from ..hub import Remote, is_repo_id, quiet_progress
from ..state import read_state, replace
from ..weights import locate_state
from .results import result_options, show_result


@click.command("pull")
@click.argument("repo_id", metavar="USER/NAME")
@click.option("--revision", metavar="REVISION", help="Branch, tag or commit. Default: main.")
@click.option("--subfolder", metavar="PATH", help="Folder in the repository.")
@click.option("--weight-name", metavar="NAME", help="Default: sla_attention.safetensors, or else sla_attention.pt.")
@click.option("--local-dir", type=click.Path(file_okay=False), help="Copy the file there as well.")
@click.option("--cache-dir", type=click.Path(file_okay=False), help="Default: the Hub's cache, HF_HOME.")
@click.option("--local-files-only", is_flag=True, help="Take it from the cache and ask nobody.")
@click.option("--force-download", is_flag=True, help="Download it again, whatever the cache has.")
@click.option("--token", metavar="TOKEN", help="Default: HF_TOKEN, or that of `hf auth login`.")
@result_options
def command(
    repo_id, revision, subfolder, weight_name, local_dir, cache_dir, local_files_only, force_download, token, as_json,
    quiet,
):  # fmt: skip
    """Download a state file, check it, and print where it is.

    load_sla_weights(pipe, "user/name") does this by itself; pull is for looking at the file, or for machines that
    have no network later.

    \b
    Examples:
      diffusers-sla pull you/wan-sla
      diffusers-sla pull you/wan-sla --revision v1.0 --local-dir weights
      diffusers-sla generate --model MODEL --sla-weights "$(diffusers-sla pull you/wan-sla)"
    """
    if not is_repo_id(repo_id):
        raise click.UsageError(f"{repo_id!r} is not a repository such as user/name, or there is such a path here")
    remote = Remote(
        repo_id,
        revision,
        subfolder,
        token,
        cache_dir,
        local_files_only=local_files_only,
        force_download=force_download,
    )
    with quiet_progress(quiet or as_json):
        path = locate_state(repo_id, weight_name, remote)
    state = read_state(path)
    if local_dir is not None:
        target = Path(local_dir) / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        replace(target, lambda temporary: shutil.copyfile(path, temporary))
        path = target
    result = {"path": str(path), "settings": state.settings, "layers": len(state.layers)}
    show_result(result, str(path), str(path), as_json=as_json, quiet=quiet)
