import json

import pytest
import torch
from click.testing import CliRunner
from matplotlib.figure import Figure
from torch.nn.attention import SDPBackend

from diffusers_sla import SLAConfig, benchmark
from diffusers_sla.cli import bench, main
from diffusers_sla.flops import sla_flops

CASE = benchmark.Case(1, 2, 640, 16, "float32", SLAConfig(topk=0.2))


def test_the_work_counted_is_the_work_done():
    dense = 4 * 2 * 640 * 640 * 16
    assert CASE.flops("forward", "dense cudnn") == dense
    assert CASE.flops("backward", "dense cudnn") == 2.5 * dense
    assert CASE.flops("forward", "flex") == 0.2 * dense
    assert CASE.flops("forward", "sla") == sla_flops(CASE.config, 1, 2, 640, 640, 16)
    linear = CASE.flops("forward", "sla") - 0.2 * dense
    assert CASE.flops("backward", "sla") == 2.5 * 0.2 * dense + 2 * linear
    assert CASE.bytes("forward") == 2 * 640 * 16 * 4 * 4


def test_ratios_are_against_the_best_dense_of_the_same_pass():
    def row(name, what, median):
        return benchmark.Row(name, what, median, median, median, 1.0, 1.0)

    rows = [row("dense a", "forward", 6.0), row("dense b", "forward", 4.0), row("sla", "forward", 2.0)]
    rows += [row("dense a", "backward", 9.0), row("sla", "backward", 3.0)]
    record = benchmark.Record({}, {}, rows)
    record._compare()
    assert [r.ratio for r in rows] == [4 / 6, 1.0, 2.0, 1.0, 3.0]


def test_backends_without_a_kernel_for_the_case_are_left_out():
    x = torch.zeros(1, 1, 8, 16)
    assert benchmark._serves(SDPBackend.FLASH_ATTENTION, x)
    assert not benchmark._serves(SDPBackend.CUDNN_ATTENTION, x)
    with pytest.raises(RuntimeError, match="unsupported for Sparse"):
        benchmark._serves(SDPBackend.MATH, x.to_sparse())


def test_backwards_are_of_forwards_that_ran_before():
    ran = []

    def make(q, k, v):
        ran.append("forward")
        return q * k * v

    sets, do = benchmark._tensors(CASE, "backward", torch.device("cpu"))
    calls = benchmark._calls(make, sets, do)
    for _ in range(4):
        assert len(next(calls)()) == 3
        assert ran == ["forward"] * benchmark.INPUT_SETS


def test_a_record_names_the_machine_and_holds_both_passes():
    measured = {"matmul_tflops": 0.1, "copy_gbs": 10.0}
    record = benchmark.run(CASE, "cpu", repeats=2, measured=measured)
    assert [(r.name, r.what) for r in record.rows] == [
        ("dense", "forward"), ("dense", "backward"), ("sla", "forward"), ("sla", "backward"),
    ]  # fmt: skip
    assert record.machine["torch"] == torch.__version__
    for r in record.rows:
        assert 0 < r.p20 <= r.median <= r.p80
        assert r.tflops == pytest.approx(CASE.flops(r.what, r.name) / r.median / 1e9)


def test_bench_writes_records_and_a_picture(tmp_path):
    arguments = ["bench", "--device", "cpu", "--shape", "1,1,256,16", "--shape", "1,1,512,16", "--dtype", "float32"]
    arguments += ["--repeats", "1", "--json", str(tmp_path / "r.json"), "--plot", str(tmp_path / "r.png")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    records = json.loads((tmp_path / "r.json").read_text())
    assert [record["case"]["L"] for record in records] == [256, 512]
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("shape", ["1,2,3", "1,2,3,0", "a,b,c,d"])
def test_a_shape_is_four_positive_numbers(shape):
    result = CliRunner().invoke(main, ["bench", "--device", "cpu", "--shape", shape])
    assert result.exit_code == 2
    assert "B,H,L,D" in result.output


def test_curves_of_a_picture_are_of_one_case_each(tmp_path, monkeypatch):
    def record(B, L, dtype):
        config = {"topk": 0.1, "blkq": 64, "blkk": 64}
        case = {"B": B, "H": 2, "L": L, "D": 32, "dtype": dtype, "config": config}
        return benchmark.Record(case, {}, [benchmark.Row("sla", "forward", 1, 1, 1, 1, 1, ratio=2.0)])

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    dtypes = ("float32", "bfloat16")
    bench._plot([record(1, L, dtype) for L in (256, 512) for dtype in dtypes], tmp_path / "x.png")
    bench._plot([record(B, 256, "float32") for B in (1, 4)], tmp_path / "x.png")
    (by_length,), (single,) = (figure.axes for figure in drawn)
    curves = {line.get_label(): list(line.get_xdata()) for line in by_length.lines if "topk" in str(line.get_label())}
    assert curves == {f"forward, topk 0.1, 2 x 32, 64x64, {dtype}": [256, 512] for dtype in dtypes}
    labels = [line.get_label() for line in single.lines if "topk" in str(line.get_label())]
    assert labels == [f"forward, topk 0.1, 2 x 32, 64x64, B {B}" for B in (1, 4)]
