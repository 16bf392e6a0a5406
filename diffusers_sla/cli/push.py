"""`diffusers-sla push`: trained SLA weights to the Hub, in one commit."""

import click

from ..hub import quiet_progress
from ..push import plan_push, push_plan
from .results import remark, result_options, show_result


@click.command("push")
@click.argument("folder", default=".", metavar="[FOLDER]", type=click.Path(file_okay=False))
@click.option("--repo", "repo_id", required=True, metavar="USER/NAME", help="Repository; made if it is not there.")
@click.option("--private/--public", default=None, help="Who may see a repository that is made.")
@click.option("--revision", metavar="BRANCH", help="Branch; made if it is not there. Default: main.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of committing.")
@click.option("--commit-message", default="Add Sparse-Linear Attention weights", show_default=True, metavar="TEXT")
@click.option("--subfolder", metavar="PATH", help="Folder in the repository, for several variants in one.")
@click.option("--weights", multiple=True, metavar="PATH", help="One more file or folder to push; repeatable.")
@click.option("--base-model", metavar="REPO", help="What this was trained from. Default: what the state says.")
@click.option("--license", "license_", metavar="ID", help="For the model card, such as apache-2.0.")
@click.option("--card", is_flag=True, help="Print the model card and stop.")
@click.option("--dry-run", is_flag=True, help="Check everything, list what would be pushed, and stop.")
@click.option("--token", metavar="TOKEN", help="Default: HF_TOKEN, or that of `hf auth login`.")
@result_options
def command(
    folder, repo_id, private, revision, create_pr, commit_message, subfolder, weights, base_model, license_, card,
    dry_run, token, as_json, quiet,
):  # fmt: skip
    """Push the state in FOLDER, the weights beside it and a model card.

    FOLDER has sla_attention.pt or sla_attention.safetensors (the other is made), and beside it a LoRA
    (pytorch_lora_weights.safetensors), a pipeline, a model, or nothing. All of it is checked before the Hub is asked
    for anything, and goes there in one commit; what is there already is not pushed again. A README.md that exists
    keeps all but the section between our markers.

    \b
    Examples:
      diffusers-sla push outputs/run --repo you/wan-sla --license apache-2.0
      diffusers-sla push outputs/run --repo you/wan-sla --dry-run
      diffusers-sla push outputs/run --repo you/wan-sla --card > README.md
      diffusers-sla push outputs/run --repo team/wan-sla --create-pr --subfolder topk-0.05
    """
    plan = plan_push(
        folder, repo_id, subfolder=subfolder, weights=weights, base_model=base_model, license=license_
    )  # fmt: skip
    if card:
        click.echo(plan.render(), nl=False)
        return
    for name in plan.left_out:
        remark(f"left out: {name} (--weights {name} takes it along)", quiet=quiet)
    if dry_run:
        sizes = {path: plan.size(path) for path in plan.files} | {"README.md": len(plan.render().encode())}
        lines = [f"{size:>12,}  {path}" for path, size in sorted(sizes.items())]
        text = "\n".join([f"would push to {repo_id}:", *lines])
        show_result(
            {"repo": repo_id, "dry_run": True, "files": sizes},
            text,
            "\n".join(sorted(sizes)),
            as_json=as_json,
            quiet=quiet,
        )
        return
    with quiet_progress(quiet or as_json):
        pushed = push_plan(
            plan, private=private, revision=revision, create_pr=create_pr, commit_message=commit_message, token=token
        )
    if plan.unused_readme:
        remark("the repository's README.md was kept; that of the folder was not used", quiet=quiet)
    if plan.card.base is None and plan.card.kind in ("state", "lora"):
        remark("the model card names no base model; --base-model REPO does", quiet=quiet)
    if not plan.has_license:
        remark("the model card names no licence; --license ID does", quiet=quiet)
    url = pushed.pull_request or f"{pushed.url}/commit/{pushed.commit}"
    text = f"pushed {len(pushed.files)} files: {url}" if pushed.changed else f"unchanged: {pushed.url}"
    show_result(vars(pushed), text, url, as_json=as_json, quiet=quiet)
