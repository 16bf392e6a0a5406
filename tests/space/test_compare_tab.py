import os
import time

import compare_tab
import serving
from PIL import Image


def test_old_videos_are_deleted_and_new_ones_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(compare_tab, "VIDEOS", tmp_path)
    frames = [Image.new("RGB", (16, 16), (80 * i, 0, 0)) for i in range(3)]
    old, young = (compare_tab._shown(frames) for _ in range(2))
    os.utime(old, (0, time.time() - 3 * compare_tab.KEPT_SECONDS))
    new = compare_tab._shown(frames)
    assert {str(path) for path in tmp_path.iterdir()} == {young, new}


def test_the_gpu_is_asked_for_by_what_there_is_to_do():
    """ZeroGPU grants about five minutes at once: what each page starts with must fit."""
    for name, model in serving.MODELS.items():
        served = serving.Served(model, None)
        one, two, three = (served.gpu_seconds(model.steps, runs) for runs in (1, 2, 3))
        assert 15 < one < two < three < 300, name
        assert served.gpu_seconds(1, 2) < two
        for steps in (None, "4", 0, -1, float("nan"), float("inf"), model.max_steps + 1, [4], {}):
            assert served.gpu_seconds(steps, 2) == 1  # refused at once
