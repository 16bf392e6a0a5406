"""The Space as a program uses it: through gradio_client."""

import re
import time
from pathlib import Path

import imageio.v3
import numpy as np
import pytest
import torch
from gradio_client import Client
from gradio_client.exceptions import AppError
from huggingface_hub import HfApi
from models import make
from PIL import Image
from pipelines import tiny_dit
from serve_tiny import TINY

from diffusers_sla import SLAConfig, apply_sla, benchmark, save_sla_weights
from diffusers_sla.compare import Variant, compare
from diffusers_sla.generation import Request, generate
from diffusers_sla.inside import look_inside

DEFAULTS = {"subject": "cat", "topk": 0.25, "seed": 3, "steps": 2, "guidance": 1.0, "dense_steps": 0}


@pytest.fixture(scope="module")
def client(space):
    return Client(space.url, verbose=False)


def memory(process):
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())[1]) / 1024


def test_compare_gives_both_images_and_the_numbers(client):
    pictures, page, numbers, _ = client.predict(**DEFAULTS, with_untrained=True, api_name="/compare")
    dense = generate(tiny_dit(), Request(class_label="cat", seed=3, steps=2, guidance_scale=1.0)).frames[0]
    left = Image.open(pictures["value"][0] if isinstance(pictures, dict) else pictures[0])
    assert np.array_equal(np.asarray(left.convert("RGB")), np.asarray(dense))
    assert [r["name"] for r in numbers["results"]] == ["dense", "SLA, trained", "SLA, untrained"]
    assert [r["exact_share"] for r in numbers["results"]] == [1.0, 0.25, 0.25]
    assert numbers["results"][1]["psnr"] != numbers["results"][2]["psnr"]
    for word in ("faster attention", "arithmetic saved", "blocks computed exactly", "PSNR", "2 steps", "CPU"):
        assert word in page


def test_what_is_trained_has_its_lora_and_dense_has_not(client, space):
    for _ in range(2):  # the second dense run comes after a trained one
        pictures, _, numbers, _ = client.predict(**DEFAULTS, with_untrained=True, api_name="/compare")
        request = Request(class_label="cat", seed=3, steps=2, guidance_scale=1.0)
        dense = generate(tiny_dit(), request).frames[0]
        left = Image.open(pictures["value"][0] if isinstance(pictures, dict) else pictures[0])
        assert np.array_equal(np.asarray(left.convert("RGB")), np.asarray(dense))
        config, state = SLAConfig(topk=0.25), space.folder / "sample" / "state"
        variants = [
            Variant(name="trained", config=config, state=state, lora=state),
            Variant(name="untrained", config=config),
            Variant(name="without the LoRA", config=config, state=state),
        ]
        _, *expected, without = (r.psnr for r in compare(tiny_dit(), request, variants, warm_up=False).results)
        assert [r["psnr"] for r in numbers["results"][1:]] == pytest.approx(expected, abs=0.05)
        assert abs(expected[0] - without) > 0.1


def test_inside_and_measure_answer(client, space):
    status, picture, block_map, *_, words, bars = client.predict(**DEFAULTS, step=2, api_name="/inside")[:7]
    assert status == ""
    assert Image.open(picture).size == (512, 512)
    assert Image.open(block_map).size == (512, 512)
    assert "attends exactly to **4 of 16** key blocks" in words
    assert bars.count("<tr>") == 2
    pipe, state = tiny_dit(), space.folder / "sample" / "state"
    request = Request(class_label="cat", seed=3, steps=2, guidance_scale=1.0)
    with Variant(name="SLA", config=SLAConfig(topk=0.25), state=state, lora=state).installed(pipe):
        expected = look_inside(pipe, request, step=2).errors.values()
    shown = [float(value) for value in re.findall(r"<td>([\d.]+)%</td>", bars)]
    assert shown == pytest.approx([100 * error for error in expected], abs=0.11)
    here = benchmark.machine(torch.device("cpu"))["cpu"]
    *_, table, missing = client.predict(machine=here, which="forward", api_name="/speed")
    assert missing == ""
    assert sorted({row[0] for row in table["data"]}) == [256, 512, 1024]
    rows = client.predict(tokens=1024, topk=0.1, api_name="/measure")["data"]
    assert [row[0] for row in rows] == ["dense", "sla"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"subject": "bird"}, "bird"),
        ({"subject": "x" * 10_000}, "xxx"),
        ({"topk": 0}, "0"),
        ({"topk": 7.0}, "7"),
        ({"topk": 0.9, "skip": 0.5}, "topk + skip must not exceed 1"),
        ({"seed": -1}, "-1"),
        ({"steps": 10_000}, "10000"),
        ({"guidance": 1e9}, "1000000000"),
        ({"blkq": 48}, "48"),
        ({"dense_steps": 99}, "99"),
    ],
)
def test_inputs_out_of_range_get_a_sentence(client, wrong, message):
    with pytest.raises(AppError) as caught:
        client.predict(**DEFAULTS | wrong, api_name="/compare")
    assert message in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert not re.search(r"/(root|tmp|home|usr)/", str(caught.value))


@pytest.mark.parametrize(
    "name",
    ["", "../../etc/passwd", "/etc/passwd", "a/b/c", "user/..", "<script>/x", "x" * 5000, "a" * 97],
)
def test_hostile_repository_names_are_refused(client, name):
    with pytest.raises(AppError, match="no repository: its name reads user/repository"):
        client.predict(name, api_name="/load")


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    """Repositories on the Hub of the tests: one that fits, one for another model, one without a state, one gated."""
    folder, api = tmp_path_factory.mktemp("states"), HfApi()
    save_sla_weights(apply_sla(tiny_dit(), SLAConfig(topk=0.3)), folder / "fits")
    save_sla_weights(apply_sla(make("wan")[0], SLAConfig()), folder / "other")
    (folder / "empty").mkdir()
    (folder / "empty" / "notes.txt").write_text("nothing")
    save_sla_weights(apply_sla(tiny_dit(), SLAConfig()), folder / "gated")
    for path in folder.iterdir():
        api.create_repo(f"alice/space-{path.name}")
        api.upload_folder(repo_id=f"alice/space-{path.name}", folder_path=path)
    api.update_repo_settings("alice/space-gated", gated="auto")


def test_a_step_that_runs_dense_has_nothing_to_show(client):
    with pytest.raises(AppError, match="The first 2 steps run dense here: look at a later one"):
        client.predict(**DEFAULTS | {"dense_steps": 2}, step=1, api_name="/inside")


def test_a_repository_that_fits_is_loaded_with_its_settings_and_used(client, repositories):
    page, details = client.predict("alice/space-fits", api_name="/load")
    assert "Loaded." in page
    assert "2 layers" in page
    details = details["value"] if isinstance(details, dict) and "value" in details else details
    assert details["settings"]["topk"] == 0.3
    # its projections are zero: what is now "trained" is what is untrained
    numbers = client.predict(**DEFAULTS, with_untrained=True, api_name="/compare")[2]
    assert numbers["results"][1]["psnr"] == numbers["results"][2]["psnr"]
    client.reset_session()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("alice/space-other", "does not suit the pipeline of this Space"),
        ("alice/space-empty", "sla_attention"),
        ("alice/space-gated", "gated|access"),
        ("nobody/nothing", "nobody/nothing"),
    ],
)
def test_a_repository_that_cannot_be_used_is_a_sentence(client, repositories, name, message):
    try:
        text = client.predict(name, api_name="/load")[0]
        assert "Not loaded" in text
    except AppError as error:
        text = str(error)
    assert re.search(message, text)
    assert not re.search(r"/(root|tmp|home|usr)/|Traceback|hf_", text)


def test_videos_come_as_h264_with_the_numbers_of_their_pixels(space):
    client = Client(space.urls["wan"], verbose=False)
    request = {"subject": "a red cat", "topk": 0.2, "seed": 1, "steps": 2, "guidance": 2.0, "dense_steps": 0}
    left, right, _, numbers, _ = client.predict(**request, with_untrained=True, api_name="/compare")
    shapes = []
    for video in (left, right):
        path = video["value"]["video"] if isinstance(video["value"], dict) else video["value"]
        facts = imageio.v3.immeta(path, plugin="FFMPEG")
        assert (facts["codec"], facts["pix_fmt"].partition("(")[0], facts["fps"]) == ("h264", "yuv420p", 16.0)
        frames = imageio.v3.imread(path, plugin="FFMPEG")
        assert Path(path).stat().st_size < frames.size / 3
        shapes.append(frames.shape)
    assert shapes == [(17, 112, 192, 3)] * 2
    make, size = TINY["wan"]
    wanted = Request(prompt="a red cat", seed=1, steps=2, guidance_scale=2.0, **size)
    untrained = compare(make(), wanted, [Variant(name="SLA", config=SLAConfig(topk=0.2))], warm_up=False)
    assert numbers["results"][2]["psnr"] == pytest.approx(untrained.results[1].psnr, abs=0.1)


def test_a_prompt_makes_an_image(space):
    client = Client(space.urls["sdxl"], verbose=False)
    request = {"subject": "a red cat", "topk": 0.25, "seed": 1, "steps": 2, "guidance": 2.0, "dense_steps": 0}
    pictures, _, numbers, _ = client.predict(**request, with_untrained=False, api_name="/compare")
    make, size = TINY["sdxl"]
    dense = generate(make(), Request(prompt="a red cat", seed=1, steps=2, guidance_scale=2.0, **size)).frames[0]
    left = Image.open(pictures["value"][0] if isinstance(pictures, dict) else pictures[0])
    assert np.array_equal(np.asarray(left.convert("RGB")), np.asarray(dense))
    assert numbers["results"][1]["exact_share"] < 1
    words = client.predict(**request, step=2, api_name="/inside")[5]
    assert "attends exactly to **1 of 4** key blocks." in words


def test_ten_visitors_at_once_each_get_their_own(space):
    clients = [Client(space.url, verbose=False) for _ in range(10)]
    jobs = [
        c.submit(**DEFAULTS | {"seed": seed, "subject": "dog"}, with_untrained=False, api_name="/compare")
        for seed, c in enumerate(clients)
    ]
    pipe = tiny_dit()
    for seed, job in enumerate(jobs):
        pictures = job.result(timeout=120)[0]
        left = Image.open(pictures["value"][0] if isinstance(pictures, dict) else pictures[0])
        dense = generate(pipe, Request(class_label="dog", seed=seed, steps=2, guidance_scale=1.0)).frames[0]
        assert np.array_equal(np.asarray(left.convert("RGB")), np.asarray(dense)), seed


def test_a_stopped_run_ends_and_the_next_one_is_right(client, space):
    job = client.submit(**DEFAULTS | {"steps": 20}, with_untrained=True, api_name="/compare")
    while not job.outputs():
        time.sleep(0.05)
    job.cancel()
    started = time.monotonic()
    numbers = client.predict(**DEFAULTS, with_untrained=False, api_name="/compare")[2]
    assert numbers["steps"] == 2
    assert time.monotonic() - started < 60
    assert "a request failed" not in space.log.read_text()


@pytest.mark.slow
def test_memory_stays_flat_over_fifty_requests(client, space):
    def run(seed):
        client.predict(**DEFAULTS | {"seed": seed}, with_untrained=True, api_name="/compare")

    for seed in range(10):
        run(seed)
    before = memory(space)
    for seed in range(50):
        run(seed)
    assert memory(space) - before < 40
