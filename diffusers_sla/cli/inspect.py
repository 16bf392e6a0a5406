"""`diffusers-sla inspect`: what is in a state file."""

import json
import sys

import click

from ..hub import Remote
from ..inspection import inspect_state


@click.command("inspect")
@click.argument("source", metavar="PATH|USER/NAME")
@click.option("--revision", metavar="REVISION", help="Branch, tag or commit of a repository.")
@click.option("--subfolder", metavar="PATH", help="Folder in the repository.")
@click.option("--weight-name", metavar="NAME", help="Name of the file in the repository.")
@click.option("--token", metavar="TOKEN", help="Default: HF_TOKEN, or that of `hf auth login`.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one line of JSON.")
def command(source, revision, subfolder, weight_name, token, as_json):
    """Show settings, layers, shapes, dtypes, norms, hashes, and what a pickle imports. Nothing is unpickled.

    Of a .safetensors file on the Hub only the header is fetched, and no norms are shown. Reads SimpleTuner's,
    TurboDiffusion's, SGLang's and FastVideo's files too. Exits with 1 if the file could not be loaded.

    \b
    Examples:
      diffusers-sla inspect outputs/run
      diffusers-sla inspect you/wan-sla --revision v1.0
      diffusers-sla inspect TurboWan2.1-T2V-1.3B-480P.pth --json
    """
    found = inspect_state(source, Remote("", revision, subfolder, token), weight_name)
    click.echo(json.dumps(found.to_dict(), default=str) if as_json else str(found))
    if found.problem:
        if as_json:
            click.echo(f"Error: {found.problem}", err=True)
        sys.exit(1)
