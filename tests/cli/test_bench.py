import pytest
from click.testing import CliRunner

from diffusers_sla import benchmark
from diffusers_sla.cli import main, options
from diffusers_sla.kernel.api import MAX_HEAD_DIM

SMALL = ["--device", "cpu", "--shape", "1,1,64,16", "--dtype", "float32", "--pass", "forward", "--repeats", "1"]


def run(*arguments):
    return CliRunner().invoke(main, ["bench", *arguments])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", f"1,1,64,{MAX_HEAD_DIM + 1}"], "--shape: the head size D must be at most 256, got 257"),
        (["--device", "nowhere"], "--device must be cuda or cpu, got 'nowhere'"),
        (["--device", "cpu:x"], "device 'cpu:x' cannot be used: "),
        (["--json", "no/where/x.json"], "--json no/where/x.json: there is no folder no/where"),
        (["--plot", "no/where/x.png"], "--plot no/where/x.png: there is no folder no/where"),
        (["--plot", "x.txt"], "a plot is written as .png, .jpg, .pdf, .svg, got 'x.txt'"),
        (["--plot", "x.png"], "--plot needs matplotlib: pip install 'diffusers-sla[demo]'"),
        (["--flex", "--pass", "backward"], "--flex: FlexAttention has no backward on a CPU; give --pass forward"),
        (["--topk", "2"], "topk must be a number in (0, 1], got 2.0"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_measured(monkeypatch, arguments, message):
    monkeypatch.setattr(benchmark, "rates", None)
    monkeypatch.setattr(options.importlib.util, "find_spec", lambda name: None)
    result = run(*SMALL, *arguments)
    assert result.exit_code == 1, result.output
    assert result.output.startswith(f"Error: {message}")
    assert len(result.output.splitlines()) == 1
