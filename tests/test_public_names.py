import subprocess
import sys

import pytest

import diffusers_sla


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


def test_all_is_what_there_is():
    modules = type(sys)
    public = {
        name
        for name, value in vars(diffusers_sla).items()
        if not name.startswith("_") and not isinstance(value, modules)
    }
    assert sorted(public) == diffusers_sla.__all__ == sorted(diffusers_sla.__all__)


def test_the_names_people_build_on():
    assert set(diffusers_sla.__all__) >= {
        "SLAAttnProcessor", "SLAConfig", "SLAError", "apply_sla", "load_sla_weights", "remove_sla", "save_sla_weights",
        "sla_attention", "sla_parameters", "sla_report",
    }  # fmt: skip


@pytest.mark.parametrize("name", diffusers_sla.__all__)
def test_every_public_name_says_what_it_is(name):
    assert getattr(diffusers_sla, name).__doc__.strip()


def test_importing_loads_nothing_heavy():
    """Triton compiles and claims a GPU, the rest belongs to extras that may not be installed."""
    # diffusers imports some of these where it finds them: counted is what this package adds to it.
    loaded = run(
        "import sys, diffusers.models.attention_dispatch, diffusers.pipelines.pipeline_utils, safetensors.torch\n"
        "before = set(sys.modules)\n"
        "import diffusers_sla\n"
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    ).split()
    assert not {"triton", "gradio", "matplotlib", "skimage", "accelerate", "peft", "click", "transformers"} & set(
        loaded
    )


def test_it_imports_where_its_extras_are_missing():
    run(
        "import sys\n"
        "sys.modules |= dict.fromkeys(['triton', 'gradio', 'matplotlib', 'skimage'])\n"
        "import diffusers_sla, diffusers_sla.generation, diffusers_sla.inside"
    )


def test_the_command_line_lists_its_commands_without_loading_them():
    out = run(
        "import sys\n"
        "from click.testing import CliRunner\n"
        "from diffusers_sla.cli import COMMANDS, main\n"
        "assert CliRunner().invoke(main, ['--version']).exit_code == 0\n"
        "print(*sorted(name for name in sys.modules if name.startswith('diffusers_sla.cli.')))"
    )
    assert out.split() == []
