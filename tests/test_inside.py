import numpy as np
import pytest
import torch
from pipelines import tiny_dit

from diffusers_sla import (
    SLAConfig,
    SLAConfigError,
    SLAError,
    apply_sla,
    record,
    select_blocks,
    sla_disabled,
    sla_layers,
)
from diffusers_sla.generation import Request, generate
from diffusers_sla.inside import look_inside, token_grid

REQUEST = Request(class_label="cat", steps=3, guidance_scale=1.0)
SPARSE = SLAConfig(topk=0.1, blkq=16, blkk=32, skip=0.5)
FIRST, SECOND = (f"transformer.transformer_blocks.{i}.attn1" for i in range(2))


@pytest.fixture(scope="module")
def pipe():
    pipe = apply_sla(tiny_dit(), SPARSE)
    with torch.no_grad():
        for layer in sla_layers(pipe).values():
            layer.state.proj_l_weight.normal_()
    return pipe


@torch.no_grad()
def test_it_shows_the_step_asked_for_and_changes_nothing(pipe):
    inside = look_inside(pipe, REQUEST, step=2)
    with record(pipe, [FIRST]) as records:
        frames = generate(pipe, REQUEST).frames
    assert inside.frames == frames
    assert list(inside.layers) == list(inside.errors) == [FIRST, SECOND]
    second = records[1]
    view = inside.layers[FIRST]
    expected = select_blocks(second.query, second.key, topk=0.1, blkq=16, blkk=32, skip=0.5, impl="reference")
    assert np.array_equal(view.block_map, expected[0])
    assert {int(value) for value in np.unique(view.block_map)} == {-1, 0, 1}
    assert (view.num_tokens, view.kept) == (1024, (0, 0))
    dense = torch.nn.functional.scaled_dot_product_attention(second.query, second.key, second.value)
    assert inside.errors[FIRST] == pytest.approx(float((second.output - dense).norm() / dense.norm()), rel=1e-4)
    assert view.sparse_norm.shape == view.linear_norm.shape == (2, 1024)


def test_without_a_trained_projection_the_linear_part_is_nothing():
    pipe = apply_sla(tiny_dit(), SPARSE)
    view = look_inside(pipe, REQUEST, step=1, layers=[SECOND]).layers[SECOND]
    assert view.linear_norm.max() < 1e-5
    assert view.sparse_norm.min() > 0


def test_maps_of_the_layers_asked_for_and_errors_of_all(pipe):
    inside = look_inside(pipe, REQUEST, step=3, layers=[SECOND])
    assert list(inside.layers) == [SECOND]
    assert list(inside.errors) == [FIRST, SECOND]


def test_what_cannot_be_shown_is_said(pipe):
    with pytest.raises(SLAConfigError, match="step must be a whole number from 1 to 3, got 4"):
        look_inside(pipe, REQUEST, step=4)
    with pytest.raises(SLAConfigError, match="no SLA layer 'nope'"):
        look_inside(pipe, REQUEST, step=1, layers=["nope"])
    with pytest.raises(SLAError, match="no SLA on this pipeline"):
        look_inside(tiny_dit(), REQUEST, step=1)
    with sla_disabled(pipe), pytest.raises(SLAError, match="no layer ran SLA in step 1"):
        look_inside(pipe, REQUEST, step=1)


@pytest.mark.parametrize(
    ("num_tokens", "size", "frames", "expected"),
    [
        (4096, (256, 256), 1, (1, 64, 64)),
        (32760, (832, 480), 81, (21, 30, 52)),  # Wan 480p
        (75600, (1280, 720), 81, (21, 45, 80)),  # Wan 720p
        (17550, (720, 480), 49, (13, 30, 45)),  # CogVideoX
        (1, (256, 256), 1, (1, 1, 1)),
        (4097, (256, 256), 1, None),
        (100, (256, 64), 1, (1, 5, 20)),
    ],
)
def test_token_grid(num_tokens, size, frames, expected):
    assert token_grid(num_tokens, *size, frames) == expected
