"""`diffusers-sla convert`: state files between formats and projects."""

import click

from ..conversion import NAMES, convert
from ..state import find_state, read_state
from .results import remark, result_options, show_result


@click.command("convert")
@click.argument("source", metavar="IN", type=click.Path())
@click.argument("out", metavar="OUT", type=click.Path())
@click.option("--layout", type=click.Choice(NAMES), default=NAMES[0], show_default=True, help="Whose names to write.")
@click.option("--sla-config", "--sla_config", metavar="JSON", help="Settings for a file that holds none.")
@click.option("--model", metavar="PATH_OR_REPO", help="Names the layers of a SimpleTuner file; configs only.")
@click.option("--base-model", metavar="REPO", help="Record this as the model the weights were trained from.")
@click.option("--token", metavar="TOKEN", help="Default: HF_TOKEN, or that of `hf auth login`.")
@result_options
def command(source, out, layout, sla_config, model, base_model, token, as_json, quiet):
    """Write the state in IN to OUT, in another format or under another project's names.

    IN is a .pt, .pth or .safetensors file of ours, SimpleTuner's, TurboDiffusion's, SGLang's or FastVideo's. OUT ends
    in .pt, .pth or .safetensors; or it is a folder, which gets sla_attention.pt and sla_attention.safetensors and,
    from a whole Wan checkpoint, the transformer as diffusers loads it.

    \b
    Examples:
      diffusers-sla convert sla_attention.pt sla_attention.safetensors
      diffusers-sla convert TurboWan2.1-T2V-1.3B-480P.pth turbo-wan --base-model Wan-AI/Wan2.1-T2V-1.3B-Diffusers
      diffusers-sla convert simpletuner/sla_attention.pt run --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers
      diffusers-sla convert run proj_l.safetensors --layout sglang
    """
    foreign = sla_config is None and read_state(find_state(source)).settings is None
    written = convert(source, out, layout=layout, config=sla_config, model=model, base_model=base_model, token=token)
    if foreign and layout == NAMES[0]:
        settings = read_state(written[-1]).settings
        remark(f"the file holds no settings; wrote what its project runs with: {settings}", quiet=quiet)
    paths = [str(path) for path in written]
    show_result({"written": paths}, "\n".join(paths), paths[0], as_json=as_json, quiet=quiet)
