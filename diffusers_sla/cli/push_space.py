"""`diffusers-sla push-space`: the demo as a Space."""

import click

from ..hub import quiet_progress
from ..space import APP, push_space, space_files
from .results import result_options, show_result


@click.command("push-space")
@click.option("--repo", "repo_id", required=True, metavar="USER/NAME", help="Space; made if it is not there.")
@click.option("--app", default=str(APP), type=click.Path(file_okay=False), help="Default: the project's space_app.")
@click.option("--private/--public", default=None, help="Who may see a Space that is made.")
@click.option("--dry-run", is_flag=True, help="List what would be pushed, and stop.")
@click.option("--token", metavar="TOKEN", help="Default: HF_TOKEN, or that of `hf auth login`.")
@result_options
def command(repo_id, app, private, dry_run, token, as_json, quiet):
    """Push the Gradio app and this package to a Space, in one commit.

    Works from a checkout of the project, where the app is. Hardware is chosen in the Space's settings.

    \b
    Examples:
      diffusers-sla push-space --repo you/sla-demo --dry-run
      diffusers-sla push-space --repo you/sla-demo --private
    """
    if dry_run:
        sizes = {name: path.stat().st_size for name, path in space_files(app).items()}
        lines = [f"{size:>12,}  {name}" for name, size in sorted(sizes.items())]
        text = "\n".join([f"would push to {repo_id}:", *lines])
        result = {"repo": repo_id, "dry_run": True, "files": sizes}
        show_result(result, text, "\n".join(sorted(sizes)), as_json=as_json, quiet=quiet)
        return
    with quiet_progress(quiet or as_json):
        pushed = push_space(repo_id, app=app, private=private, token=token)
    text = f"pushed {len(pushed.files)} files: {pushed.url}" if pushed.changed else f"unchanged: {pushed.url}"
    show_result(vars(pushed), text, pushed.url, as_json=as_json, quiet=quiet)
