from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from diffusers_sla import SLAConfig, pictures
from diffusers_sla.compare import Comparison, Result
from diffusers_sla.inside import LayerView
from diffusers_sla.pictures import (
    BLOCK_COLOURS,
    block_map_image,
    branch_images,
    comparison_picture,
    where_a_block_looks,
    wrapped,
)
from diffusers_sla.report import LayerReport, SLAReport
from diffusers_sla.report_picture import report_picture

UNET_LAYER = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1"

MAP = np.array([[1, 0, 0, -1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], dtype=np.int8)


def view(kept=(0, 0)):
    norms = np.ones((1, 64 + sum(kept)), np.float32)
    return LayerView("transformer.a", SLAConfig(blkq=16, blkk=16), MAP[None], kept, kept, 64 + sum(kept), norms, norms)


def test_a_block_map_has_a_row_per_query_block_and_a_colour_per_kind():
    picture = block_map_image(MAP, 40)
    assert picture.size == (40, 40)
    pixels = np.asarray(picture)
    for (row, column), value in np.ndenumerate(MAP):
        block = pixels[row * 10 : row * 10 + 10, column * 10 : column * 10 + 10].reshape(-1, 3)
        assert np.array_equal(np.unique(block, axis=0), [BLOCK_COLOURS[value][0]])


@pytest.mark.parametrize("kept", [(0, 0), (7, 0)])
def test_a_query_block_and_its_keys_lie_where_their_tokens_are(kept):
    # 64 tokens on 8 x 8, 16 a block: two rows of tokens each. Block 0 attends to itself, as does every other one.
    white = Image.new("RGB", (80, 80), "white")
    pixels = np.asarray(where_a_block_looks(view(kept), [white], 0, 1)[0])
    red = pixels[..., 0].astype(int) - pixels[..., 1] > 50
    assert red[20:40].all()
    assert not red[:20].any()
    assert not red[40:].any()
    assert (pixels[:20] < 120).all()  # not attended to: dark


def test_a_pixel_belongs_to_the_query_block_of_its_token():
    white = [Image.new("RGB", (80, 80), "white")]
    assert [view().block_at(x, y, white) for x, y in ((0, 0), (79, 19), (0, 20), (79, 79))] == [0, 0, 1, 3]
    with pytest.raises(ValueError, match=r"no pixel \(80, 0\)"):
        view().block_at(80, 0, white)


def test_the_branches_share_one_scale_of_colours():
    white, both = [Image.new("RGB", (80, 80), "white")], view((7, 0))
    both.linear_norm = np.zeros_like(both.linear_norm)
    both.sparse_norm[0, 7] = 2.0  # the first token after the text is the brightest, in the corner
    sparse, linear = (np.asarray(picture).astype(int).sum(2) for picture in branch_images(both, white, 0))
    assert sparse[0, 0] == sparse.max() > sparse[40, 40] > linear.max()
    assert linear.min() == linear.max()


def test_what_the_branches_add_is_of_the_frame_asked_for():
    video, frames = view(), [Image.new("RGB", (80, 80))] * 4  # 16 tokens a frame
    video.sparse_norm = np.repeat(np.arange(4, dtype=np.float32), 16)[None]
    video.linear_norm = np.full((1, 64), 3.0, np.float32)
    seen = [np.asarray(branch_images(video, frames, 0, frame)[0]).sum() for frame in (0, 1, 2, 3, None)]
    assert seen[0] < seen[1] < seen[2] < seen[3]
    assert seen[4] == seen[2]


def test_tokens_that_are_no_grid_are_refused():
    with pytest.raises(ValueError, match="64 tokens are no grid over 1 frames of 80x17"):
        where_a_block_looks(view(), [Image.new("RGB", (80, 17))], 0, 0)
    with pytest.raises(ValueError, match="q_block must be from 0 to 3, got 4"):
        where_a_block_looks(view(), [Image.new("RGB", (80, 80))], 0, 4)


def test_a_comparison_is_drawn_with_its_block_maps():
    frame = Image.new("RGB", (32, 32), "teal")
    dense = Result("dense", None, [frame], 2.0, 1.0, 1, 100, 1.0)
    sla = Result("SLA", SLAConfig(), [frame], 1.5, 0.5, 1, 20, 0.2, {}, float("inf"), 1.0)
    picture = comparison_picture(Comparison([dense, sla], 1, "CPU", "float32", "2"), [(view(), 0)], "title")
    colours = {tuple(c) for c in np.asarray(picture).reshape(-1, 3)[::7]}
    assert {(0, 128, 128), *(colour for colour, _ in BLOCK_COLOURS.values())} <= colours
    without = comparison_picture(Comparison([dense, sla], 1, "CPU", "float32", "2"))
    assert without.height < picture.height


@pytest.mark.parametrize(("width", "lines"), [(60, 1), (27, 2), (24, 3), (5, 5)])
def test_a_name_breaks_between_parts_and_keeps_their_numbers(width, lines):
    name = "down_block 0.attentions.0.block 0.attn1, head 0"
    parts = wrapped(name, width).split("\n")
    assert len(parts) == lines
    assert "".join(parts).replace(" ", "") == name.replace(" ", "")
    assert not any(part[0].isdigit() for part in parts)
    assert width < 24 or max(map(len, parts)) <= width


@pytest.mark.parametrize("layer", ["transformer.transformer_blocks.27.attn1", UNET_LAYER])
def test_no_title_touches_another_or_the_edge(monkeypatch, layer):
    monkeypatch.setattr(pictures, "render", lambda figure: figure)
    one = Result("dense", None, [Image.new("RGB", (32, 32))], 1.0, 1.0, 1, 1, 1.0)
    views = [(replace(view(), layer=layer), 0)] * 6
    no_overlap(comparison_picture(Comparison([one, one], 1, "cpu", "float32", "2"), views, "title"))


def test_no_title_of_a_report_touches_another_or_the_edge(monkeypatch):
    monkeypatch.setattr(pictures, "render", lambda figure: figure)
    why = {"4095 queries are fewer than min_length, which is 4096 on this device": 12}
    layers = {f"{UNET_LAYER}{i}": LayerReport("sla", calls_sla=1, calls_dense=why) for i in range(7)}
    no_overlap(report_picture(SLAReport({}, layers)))


def no_overlap(figure):
    figure.canvas.draw()
    boxes = [axes.title.get_window_extent() for axes in figure.axes if axes.get_title()]
    assert len(boxes) >= 7
    for i, box in enumerate(boxes):
        assert figure.bbox.containsx(box.x0)
        assert figure.bbox.containsx(box.x1)
        assert not box.count_overlaps(boxes[i + 1 :])
