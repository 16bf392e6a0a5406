import multiprocessing

import pytest
import ranks
import torch

from diffusers_sla.parallel import Ulysses, ulysses


@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_ulysses_is_the_single_process(world, tmp_path):
    """Wan, Flux and Qwen over several processes; in the latter two each holds a part of the text and of the image.
    Ring attention is refused with its reason."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ranks"])  # imports once for all of them
    arguments = (world, str(tmp_path / "store"), str(tmp_path / "result.pt"))
    processes = [context.Process(target=ranks.main, args=(rank, *arguments)) for rank in range(world)]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(timeout=240)
            assert process.exitcode == 0
    finally:
        for process in processes:
            process.kill()
    found = torch.load(tmp_path / "result.pt")
    for name in ("wan", "flux", "qwen"):
        assert found[name]["output"] < 1e-5, (name, found[name])
        assert found[name]["gradients"] < 1e-4, (name, found[name])
    assert "all of them at hand; use ulysses_degree" in found["ring"]


@pytest.mark.parametrize("side", ["first", "last"])
def test_text_and_image_of_all_ranks_are_put_in_order_and_back(side):
    exchange = Ulysses(None, 3)
    text, image = ["t0", "t1", "t2", "t3", "t4", "t5"], [f"i{n}" for n in range(9)]
    parts = [text[2 * r : 2 * r + 2] + image[3 * r : 3 * r + 3] for r in range(3)]
    if side == "last":
        parts = [part[2:] + part[:2] for part in parts]
    names = [name for part in parts for name in part]
    gathered = torch.arange(15)[None, :, None]
    ordered = exchange._sorted(gathered, 2, side)
    expected = text + image if side == "first" else image + text
    assert [names[i] for i in ordered.flatten().tolist()] == expected
    assert torch.equal(exchange._unsorted(ordered, 2, side), gathered)


def test_without_parallelism_nothing_is_exchanged():
    assert ulysses(None, 4, 4) == (None, None)
