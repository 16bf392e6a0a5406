"""`diffusers-sla export-kernel`: the op alone, as Hugging Face `kernels` loads it."""

import click

from ..export_kernel import BACKENDS, export_kernel, push_kernel
from .results import result_options, show_result


@click.command("export-kernel")
@click.argument("out", type=click.Path(file_okay=False))
@click.option(
    "--version", "kernel_version", type=click.IntRange(0), default=1, show_default=True, help="0 for trials."
)
@click.option("--backends", default=",".join(BACKENDS), show_default=True, metavar="LIST", help="Which to write.")
@click.option("--push", "repo_id", metavar="ORG/REPO", help="Push it there, as a kernel repository.")
@click.option("--token", metavar="TOKEN", help="Default: HF_TOKEN, or that of `hf auth login`.")
@result_options
def command(out, kernel_version, backends, repo_id, token, as_json, quiet):
    """Write the kernel to OUT in the layout that Hugging Face kernels loads.

    What comes out needs torch (and triton on a GPU) and neither diffusers nor this package. On the Hub it is a kernel
    repository with one branch per version, for which an organization needs the Hub's approval.

    \b
    Examples:
      diffusers-sla export-kernel outputs/kernel
      diffusers-sla export-kernel outputs/kernel --version 1 --push acme/sla-attention
      python -c "from pathlib import Path; import kernels; kernels.get_local_kernel(Path('outputs/kernel'))"
    """
    wanted = [backend.strip() for backend in backends.split(",") if backend.strip()]
    builds = export_kernel(
        out, kernel_version=kernel_version, backends=wanted, **({"repo_id": repo_id} if repo_id else {})
    )
    result = {"builds": [str(build) for build in builds], "version": kernel_version}
    lines, main = list(result["builds"]), str(out)
    if repo_id:
        pushed = push_kernel(out, repo_id, kernel_version=kernel_version, token=token)
        result["pushed"] = main = f"{pushed.url}/tree/v{kernel_version}"
        lines.append(f"pushed: {main}" if pushed.changed else f"unchanged: {main}")
    show_result(result, "\n".join(lines), main, as_json=as_json, quiet=quiet)
