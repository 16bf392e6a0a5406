import os
import threading
import time

import app
import gradio as gr
import pytest
import serving

from diffusers_sla import SLAConfigError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/user/.cache/hub/models--a/x.pt is damaged", "x.pt is damaged"),
        ("token hf_AbC123 is wrong", "token (token) is wrong"),
        ("https://huggingface.co/user/repo and user/repo stay", "https://huggingface.co/user/repo and user/repo stay"),
    ],
)
def test_what_strangers_may_read(text, expected):
    assert serving.public(text) == expected
    assert len(serving.public("x" * 1000)) == 400


@pytest.mark.parametrize("text", ["", "  ", None, 3, "x" * 10_000])
def test_prompts_of_no_sensible_length_are_refused(text):
    with pytest.raises(gr.Error):
        serving.checked_prompt(text)


def test_an_unexpected_error_shows_nothing_of_itself():
    def fail():
        raise RuntimeError("secret at /home/someone/place")

    with pytest.raises(gr.Error, match="Something went wrong here"):
        serving.answered(fail)


def test_a_closed_stream_ends_its_work_and_frees_the_pipeline():
    served = serving.Served(serving.MODELS["sample"], None)
    steps = []

    def work(on_progress):
        for step in range(1000):
            steps.append(step)
            on_progress("x", step, 1000)
            time.sleep(0.01)

    stream = serving.streamed(served, work)
    assert isinstance(next(stream), serving.Progress)
    stream.close()
    assert served.lock.acquire(timeout=5)
    assert len(steps) < 500


def test_a_fork_waits_for_the_pipeline_and_can_use_it():
    """A lock that is held where a process forks stays held in the child for ever."""
    served = serving.Served(serving.MODELS["sample"], None)
    served.fork_only_at_rest()
    served.lock.acquire()
    threading.Timer(0.3, served.lock.release).start()
    child = os.fork()
    if not child:
        os._exit(0 if served.lock.acquire(timeout=2) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert not served.lock.locked()


def test_work_waits_for_the_pipeline_and_its_result_comes_last():
    served, order = serving.Served(serving.MODELS["sample"], None), []
    served.lock.acquire()
    threading.Timer(0.3, lambda: (order.append("freed"), served.lock.release())).start()
    seen = list(serving.streamed(served, lambda on_progress: order.append("ran") or "result"))
    assert order == ["freed", "ran"]
    assert seen[-1] == "result"
    assert all(isinstance(part, serving.Progress) for part in seen[:-1])


def test_a_model_that_cannot_be_loaded_gives_a_page_that_says_so(monkeypatch):
    monkeypatch.setenv("SPACE_MODEL", "nothing")
    with pytest.raises(SLAConfigError, match="must be one of sample, wan, sdxl, got 'nothing'"):
        serving.load()
    shown = [block.value for block in app.page().blocks.values() if isinstance(block, gr.HTML)]
    assert "could not be loaded: SPACE_MODEL must be one of" in shown[0]
