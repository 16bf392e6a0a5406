import json
import os

import pytest
import torch
from click.testing import CliRunner

from diffusers_sla import tuning
from diffusers_sla.cli import main
from diffusers_sla.kernel import launch
from diffusers_sla.kernel.launch import Launch

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_table(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSERS_SLA_TUNED", str(tmp_path / "folder" / "tuned.json"))
    launch.table.cache_clear()
    yield tmp_path / "folder" / "tuned.json"
    launch.table.cache_clear()


def test_the_fastest_right_tiles_are_kept(monkeypatch):
    """Times are made up: 4 ms by default, one trial takes 1 ms but answers wrongly, another takes 2 ms."""
    q = torch.empty(1, 1, 1, 16)
    default = launch.dq_config(q, 32, 32)
    wrong, better = Launch(num_warps=8, num_stages=1), Launch(num_warps=4, num_stages=4)
    key = launch.table_key(launch.dq_config, q, 32, 32)
    monkeypatch.setattr(tuning, "_kernels", lambda q, blkq, blkk: (("backward", launch.dq_config, q, (blkq, blkk)),))
    monkeypatch.setattr(tuning, "_trials", lambda *arguments: iter([better, wrong]))
    monkeypatch.setattr(tuning, "sla_attention", lambda q, k, v, **_: (q + k) * v)
    times = {default: 4.0, wrong: 1.0, better: 2.0}
    now = lambda: launch.dq_config(q, 32, 32)  # noqa: E731
    monkeypatch.setattr(tuning.benchmark, "milliseconds", lambda calls, device, repeats: [times[now()]] * 3)
    monkeypatch.setattr(tuning, "_same", lambda a, b: now() != wrong)
    (found,) = tuning.tune("cpu", tuning.Calls(16, "float32", 32, 32, H=1, L=64))
    assert found == tuning.Found(key, "backward", better, 4.0, 2.0, 2)
    assert launch.table(CPU) == {key: better}


def test_where_nothing_is_faster_the_table_stays(monkeypatch):
    q = torch.empty(1, 1, 1, 16)
    default, slower = launch.dq_config(q, 32, 32), Launch(num_warps=8, num_stages=1)
    monkeypatch.setattr(tuning, "_kernels", lambda q, blkq, blkk: (("backward", launch.dq_config, q, (blkq, blkk)),))
    monkeypatch.setattr(tuning, "_trials", lambda *arguments: iter([slower]))
    monkeypatch.setattr(tuning, "sla_attention", lambda q, k, v, **_: (q + k) * v)
    times = {default: 1.0, slower: 2.0}
    monkeypatch.setattr(tuning.benchmark, "milliseconds", lambda *_: [times[launch.dq_config(q, 32, 32)]])
    (found,) = tuning.tune("cpu", tuning.Calls(16, "float32", 32, 32, H=1, L=64))
    assert (found.launch, found.before, found.after, found.tried) == (default, 1.0, 1.0, 1)
    assert launch.table(CPU) == {}


def test_tiles_there_are_that_do_not_run_are_named(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(tuning, "sla_attention", fail)
    with pytest.raises(RuntimeError, match=r"forward of prepare 16x4 32x1 does not run .*Launch.*: crashed"):
        list(tuning.tune("cpu", tuning.Calls(16, "float32", 32, 32, H=1, L=64)))


def test_every_kernel_is_tuned_on_real_calls(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("the table of a CPU")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    trials = {"forward_config": [Launch(block_m=32, block_n=32)], "dkdv_config": [Launch(block_m=32, block_n=32)]}
    monkeypatch.setattr(tuning, "_trials", lambda name, *_: iter(trials.get(name, [])))
    found = list(tuning.tune("cpu", tuning.Calls(16, "float32", 32, 32, 1, 96, 0.4), repeats=1))
    names = ["prepare 16x4 32x1", "forward 16x4 32x32", "linear_q 16x4 1", "linear_k 16x4 1", "dq 16x4 32x32", "dkdv 16x4 32x32"]  # fmt: skip  # noqa: E501
    assert [f.key for f in found] == names
    assert [f.tried for f in found] == [0, 1, 0, 0, 0, 1]
    monkeypatch.setattr(launch, "takes_gluon", lambda *_: True)
    found = list(tuning.tune("cpu", tuning.Calls(16, "float32", 32, 32, 1, 96, 0.4), repeats=1))
    assert [f.key for f in found] == names[:2] + names[4:]
    kernels = tuning._kernels(torch.empty(1, 1, 1, 128, dtype=torch.bfloat16), 64, 64)
    assert [chosen.__name__ for _, chosen, *_ in kernels] == ["dq_config", "dkdv_config"]
    half = tuning._kernels(torch.empty(1, 1, 1, 128, dtype=torch.float16), 64, 64)  # its gradients are Triton's
    keys = [launch.table_key(chosen, x, *sizes) for _, chosen, x, sizes in half]
    assert keys == ["linear_q 128x2 1", "linear_k_float16 128x4 1", "dq 128x2 64x64", "dkdv 128x2 64x64"]


def outcome_of(work):
    """Leaves its process as an illegal address does (1), or kills it (2)."""
    global broken
    if work == 2:
        os._exit(1)
    if globals().get("broken"):
        return "broken before"
    broken = work == 1
    return "crashed" if broken else "fits"


def test_a_trial_that_breaks_its_process_spoils_no_other():
    with tuning.Workers(0, lambda work: work + 1) as none:
        assert none.map([1, 2]) == [2, 3]
    with tuning.Workers(2, outcome_of) as workers:
        assert workers.map([0, 1, 0, 2, 0, 0, 1]) == ["fits", "crashed", "fits", "crashed", "fits", "fits", "crashed"]
        assert workers.map([0, 0]) == ["fits", "fits"]


@pytest.mark.parametrize("name", ["forward_config", "dq_config", "dkdv_config"])
@pytest.mark.parametrize(("blkq", "blkk"), [(64, 64), (128, 64), (16, 128)])
def test_trials_fit_blocks_and_memory(name, blkq, blkk):
    q = torch.empty(1, 1, 1, 128, dtype=torch.bfloat16)
    default = getattr(launch, name)(q, blkq, blkk)
    trials = list(tuning._trials(name, default, q, blkq, blkk))
    assert len(trials) == len(set(trials)) > 5
    assert default not in trials
    for trial in trials:
        whole, of = (trial.block_n, blkk) if name == "dkdv_config" else (trial.block_m, blkq)
        streamed, block = (trial.block_m, blkq) if name == "dkdv_config" else (trial.block_n, blkk)
        assert of % whole == 0
        assert max(streamed, block) % min(streamed, block) == 0


def test_a_written_table_is_used_and_keeps_other_gpus(own_table):
    own_table.parent.mkdir()
    own_table.write_text(json.dumps({"another GPU": {"forward 128x2 64x64": {"num_warps": 8}}}))
    entry = Launch(num_warps=8, num_stages=1, block_m=16, block_n=32)
    launch.table(CPU)["forward 16x4 32x32"] = entry
    launch.save_table(CPU)
    launch.table.cache_clear()
    q = torch.empty(1, 1, 1, 16)
    assert launch.forward_config(q, 32, 32) == entry
    assert launch.forward_config(q, 32, 16) != entry
    assert json.loads(own_table.read_text())["another GPU"] == {"forward 128x2 64x64": {"num_warps": 8}}


@pytest.mark.parametrize("text", ["{", "[1]", '{"cpu": {"forward 16x4 32x32": {"warps": 4}}}'])
def test_a_broken_table_is_named(own_table, text):
    own_table.parent.mkdir()
    own_table.write_text(text)
    with pytest.raises(ValueError, match=r"tuned\.json is no table of tiles .*diffusers-sla tune"):
        launch.forward_config(torch.empty(1, 1, 1, 16), 32, 32)


def test_without_a_gpu_there_is_nothing_to_tune():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = CliRunner().invoke(main, ["tune"])
    assert result.exit_code == 1
    assert "no GPU" in result.output
    assert CliRunner().invoke(main, ["tune", "--blocks", "64"]).exit_code == 2
