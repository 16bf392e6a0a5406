"""How commands tell their result: for people, as JSON (--json), or the one value that matters (-q)."""

import json
from typing import Any

import click


def result_options(command):
    """Adds --json and --quiet."""
    command = click.option("-q", "--quiet", is_flag=True, help="Print the one value that matters, nothing else.")(
        command
    )
    return click.option("--json", "as_json", is_flag=True, help="Print the result as one line of JSON.")(command)


def show_result(result: dict[str, Any], text: str, main: str, *, as_json: bool, quiet: bool) -> None:
    """result: for programs. text: for people. main: for -q, what a shell would put into a variable."""
    click.echo(json.dumps(result, default=str) if as_json else main if quiet else text)


def remark(text: str, *, quiet: bool = False) -> None:
    """Tell something that is not the result."""
    if not quiet:
        click.echo(text, err=True)
