"""`diffusers-sla`: one file per command, imported only when that command runs.

Results go to stdout, messages to stderr. Exit codes: 0 done, 1 a known error (one line), 2 wrong usage.
"""

import importlib

import click

from ..errors import SLAError

# Command -> file here; each file has a click command named `command`.
COMMANDS: dict[str, str] = {
    "bench": "bench",
    "tune": "tune",
    "demo": "demo",
    "generate": "generate",
    "finetune": "finetune",
    "calibrate": "calibrate",
    "push": "push",
    "pull": "pull",
    "inspect": "inspect",
    "convert": "convert",
    "doctor": "doctor",
    "export-kernel": "export_kernel",
    "push-space": "push_space",
}


class _LazyGroup(click.Group):
    def list_commands(self, ctx):
        return list(COMMANDS)

    def get_command(self, ctx, name):
        if name not in COMMANDS:
            return None
        return importlib.import_module(f".{COMMANDS[name]}", __package__).command

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except (SLAError, OSError) as error:
            raise click.ClickException(" ".join(str(error).split())) from error


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="diffusers-sla")
def main():
    """Sparse-Linear Attention for Hugging Face Diffusers."""
