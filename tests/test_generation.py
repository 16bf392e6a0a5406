import importlib.util
import inspect

import imageio.v3
import numpy as np
import pytest
import torch
from diffusers import LattePipeline
from PIL import Image
from pipelines import SIZES, make_pipeline, tiny_dit

from diffusers_sla import SLAConfigError, SLAUnsupportedError
from diffusers_sla.generation import Request, generate, load_pipeline, save_frames, stepping


class TextPipeline:
    def __call__(self, prompt, num_inference_steps=50, height=None):
        raise AssertionError("not called")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"seed": -1}, "seed must be a whole number from 0 to 9223372036854775807, got -1"),
        ({"seed": None}, "seed must be a whole number"),
        ({"steps": 0}, "steps must be a whole number from 1 to 1000, got 0"),
        ({"steps": 2.5}, "steps must be a whole number from 1 to 1000, got 2.5"),
        ({"width": 9000}, "width must be a whole number from 8 to 8192, got 9000"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a number from 0 to 100, got nan"),
    ],
)
def test_values_out_of_range_are_named(wrong, message):
    with pytest.raises(SLAConfigError, match=message):
        Request(**wrong)


@pytest.mark.parametrize(
    ("pipe", "request_", "message"),
    [
        (tiny_dit(), Request(), r"a class label is needed \(--class-label\); DiTPipeline has the classes cat, dog"),
        (tiny_dit(), Request(class_label="bird"), "no class 'bird'; DiTPipeline has the classes cat, dog"),
        (tiny_dit(), Request(class_label=2), "no class '2'"),
        (tiny_dit(), Request(class_label="cat", prompt="a cat"), "takes no prompt; its classes are cat, dog"),
        (tiny_dit(), Request(class_label="cat", num_frames=5), "DiTPipeline takes no num frames"),
        (TextPipeline(), Request(), "TextPipeline needs a prompt"),
        (TextPipeline(), Request(class_label="cat", prompt="x"), "takes a prompt, not a class label"),
    ],
)
def test_a_request_that_does_not_suit_the_pipeline_says_what_would(pipe, request_, message):
    with pytest.raises(SLAConfigError, match=message):
        request_.arguments(pipe)


def test_arguments_are_the_ones_given_and_no_others():
    assert Request(class_label="dog", steps=3).arguments(tiny_dit()) == {"class_labels": [1], "num_inference_steps": 3}
    assert Request(class_label="1").arguments(tiny_dit()) == {"class_labels": [1]}
    assert Request(prompt="a cat", height=64).arguments(TextPipeline()) == {"prompt": "a cat", "height": 64}
    assert Request(prompt="a cat").num_steps(TextPipeline()) == 50


def test_generate_is_the_pipelines_own_call_and_counts_its_steps():
    pipe, seen = tiny_dit(), []
    request = Request(class_label="dog", seed=5, steps=3, guidance_scale=1.0)
    result = generate(pipe, request, on_step=lambda *step: seen.append(step))
    expected = pipe(
        [1], guidance_scale=1.0, num_inference_steps=3, generator=torch.Generator().manual_seed(5)
    ).images  # fmt: skip
    assert result.frames == expected
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert "step" not in vars(pipe.scheduler)


def test_frames_are_images_where_the_pipeline_gives_arrays_by_itself():
    """Numbers from 0 to 1 taken for pixels up to 255 made every comparison of Wan videos look 48 dB better."""
    pipe = make_pipeline("wan")
    frames = generate(pipe, Request(prompt="a red cat", steps=1, guidance_scale=1.0, **SIZES["wan"])).frames
    arrays = pipe(
        "a red cat", num_inference_steps=1, guidance_scale=1.0, generator=torch.Generator().manual_seed(0),
        **SIZES["wan"],
    ).frames[0]  # fmt: skip
    assert [frame.size for frame in frames] == [(64, 64)] * 5
    assert np.abs(np.stack([np.asarray(frame) for frame in frames]) - 255 * arrays).max() < 1


def test_what_on_step_raises_ends_the_generation():
    pipe, done = tiny_dit(), []

    def stop(step, total):
        done.append(step)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(pipe, Request(class_label=0, steps=5), on_step=stop)
    assert done == [1]
    assert "step" not in vars(pipe.scheduler)


def test_stepping_nests_and_keeps_the_schedulers_signature():
    pipe, outer, inner = tiny_dit(), [], []
    signature = inspect.signature(pipe.scheduler.step)
    with stepping(pipe, outer.append):
        assert inspect.signature(pipe.scheduler.step) == signature  # pipelines read it
        with stepping(pipe, inner.append):
            pipe([0], num_inference_steps=2, guidance_scale=1.0)
        pipe([0], num_inference_steps=1, guidance_scale=1.0)
    assert (outer, inner) == ([1, 2, 3], [1, 2])


def test_loading_says_what_is_wrong(tmp_path):
    with pytest.raises(SLAUnsupportedError, match="device 'nowhere' cannot be used"):
        load_pipeline(tmp_path, "nowhere")
    with pytest.raises(OSError, match=r"model_index\.json"):
        load_pipeline(tmp_path)
    with pytest.raises(SLAUnsupportedError, match="cannot be loaded as a pipeline"):
        load_pipeline(tmp_path / "missing")
    for model in ("./missing", "a/b/c", "no such"):
        with pytest.raises(SLAUnsupportedError, match=f"'{model}' cannot be .* there is no such folder"):
            load_pipeline(model)


def test_a_video_comes_of_pipelines_that_take_a_number_of_frames():
    assert not Request(class_label=0).makes_video(tiny_dit())
    wan = make_pipeline("wan")
    requests = [Request(prompt="a"), Request(prompt="a", num_frames=5), Request(prompt="a", num_frames=1)]
    assert [request.makes_video(wan) for request in requests] == [True, True, False]
    assert Request(prompt="a").makes_video(object.__new__(LattePipeline))  # its number of frames is video_length


def test_frames_are_written_by_suffix(tmp_path, monkeypatch):
    frames = [Image.new("RGB", (16, 16), (80 * i, 0, 0)) for i in range(3)]
    assert Image.open(save_frames(frames[:1], tmp_path / "new" / "x.png")).size == (16, 16)
    video = Image.open(save_frames(frames, tmp_path / "x.gif", fps=10))
    assert (video.n_frames, video.info["duration"]) == (3, 100)
    assert imageio.v3.improps(save_frames(frames, tmp_path / "x.mp4"), plugin="FFMPEG").shape[1:] == (16, 16, 3)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SLAUnsupportedError, match="needs imageio and imageio-ffmpeg"):
        save_frames(frames, tmp_path / "y.mp4")
    with pytest.raises(SLAConfigError, match=r"a video is written as .*, got 'x\.png'"):
        save_frames(frames, tmp_path / "x.png")
    with pytest.raises(SLAConfigError, match=r"an image is written as .*, got 'x\.txt'"):
        save_frames(frames[:1], tmp_path / "x.txt")
