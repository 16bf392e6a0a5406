"""`diffusers-sla doctor`: does SLA work here?"""

import json
import sys

import click

from ..doctor import examine


@click.command("doctor")
@click.option("--offline", is_flag=True, help="Do not ask the Hub.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one line of JSON.")
def command(offline, as_json):
    """Tell versions and hardware, run the kernels against the reference, and ask whether the Hub answers.

    The output is meant to be pasted into a bug report: a token is told to be there, never shown. Exits with 1 if a
    check fails.

    \b
    Examples:
      diffusers-sla doctor
      diffusers-sla doctor --offline --json
    """
    report = examine(offline=offline)
    click.echo(json.dumps(report.to_dict()) if as_json else str(report))
    if not report.passed:
        failed = ", ".join(check.name for check in report.checks if check.passed is False)
        click.echo(f"Error: failed: {failed}", err=True)
        sys.exit(1)
