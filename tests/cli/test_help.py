"""What help texts, README and docs tell people to type is what the commands take."""

import re
import shlex
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from diffusers_sla.cli import COMMANDS, main

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def examples(text):
    """The arguments of every diffusers-sla command in a text, without what a shell makes of them."""
    for line in text.replace("\\\n", " ").splitlines():
        match = re.match(r"\s*(?:\$ )?diffusers-sla (\S.*)", line)
        if match:
            yield shlex.split(re.split(r"\s[>|&]\s|\s#\s|\s\s+#", match[1])[0], comments=True)


def check(arguments):
    name, *rest = arguments
    if name.startswith("-"):
        return
    assert name in COMMANDS, name
    command = main.get_command(click.Context(main), name)
    context = click.Context(command, info_name=name)
    values, _, _ = command.make_parser(context).parse_args(rest)
    for parameter in command.params:
        if parameter.required:
            assert values.get(parameter.name) is not None, f"{name} needs {parameter.name}"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_teaches_by_examples(name):
    shown = CliRunner().invoke(main, [name, "--help"], terminal_width=200)
    assert shown.exit_code == 0
    assert "Examples:" in shown.output
    found = list(examples(main.get_command(click.Context(main), name).help))
    assert found
    assert name in {arguments[0] for arguments in found}
    for arguments in found:
        check(arguments)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_on_a_page_is_one_that_there_is(page):
    for arguments in examples(page.read_text(encoding="utf-8")):
        check(arguments)


def test_the_pages_name_every_command():
    pages = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert not [name for name in COMMANDS if f"diffusers-sla {name}" not in pages and f"`{name}`" not in pages]


def test_unknown_commands_and_no_command():
    assert CliRunner().invoke(main, ["no-such"]).exit_code == 2
    assert "push" in CliRunner().invoke(main, ["--help"]).output
