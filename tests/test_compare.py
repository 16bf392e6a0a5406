import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import tiny_dit, write_lora

from diffusers_sla import SLAConfig, SLAError, apply_sla, sla_layers
from diffusers_sla.compare import Variant, _steps_to_warm_up, compare, psnr, ssim
from diffusers_sla.flops import dense_flops, sla_flops
from diffusers_sla.generation import Request, generate
from diffusers_sla.lora import add_lora
from diffusers_sla.weights import sla_state

REQUEST = Request(class_label="cat", seed=1, steps=3, guidance_scale=1.0)
SPARSE = SLAConfig(topk=0.1, blkq=16, blkk=16)


@pytest.fixture(scope="module")
def comparison():
    pipe, calls = tiny_dit(), []
    every = Variant(name="all", config=SLAConfig(topk=1.0, linear="none"))
    result = compare(
        pipe, REQUEST, [Variant(name="tenth", config=SPARSE), every], on_progress=lambda *c: calls.append(c)
    )
    assert not sla_layers(pipe)
    assert calls == [(name, step, 3) for name in ("dense", "tenth", "all") for step in (1, 2, 3)]
    return result


def test_dense_is_the_untouched_pipeline(comparison):
    assert comparison.dense.frames == generate(tiny_dit(), REQUEST).frames
    assert (comparison.dense.psnr, comparison.dense.ssim, comparison.dense.exact_share) == (None, None, 1.0)
    assert comparison.dense.attention_flops == 2 * 3 * dense_flops(1, 2, 1024, 1024, 8)


def test_a_variant_is_the_pipeline_with_sla(comparison):
    pipe = apply_sla(tiny_dit(), SPARSE)
    tenth = comparison.results[1]
    assert tenth.frames == generate(pipe, REQUEST).frames
    assert tenth.exact_share == 6 / 64
    assert tenth.attention_flops == 2 * 3 * sla_flops(SPARSE, 1, 2, 1024, 1024, 8)
    assert tenth.attention_calls == 6  # the warm-up's are not among them
    assert tenth.dense_calls == {}
    assert tenth.psnr < comparison.results[2].psnr
    assert 0 < tenth.attention_seconds < tenth.seconds


def test_every_block_kept_is_as_good_as_dense(comparison):
    every = comparison.results[2]
    assert every.psnr > 60
    assert every.ssim > 0.999
    assert every.exact_share == 1.0


def test_the_table_and_the_dict_say_the_same(comparison):
    table = str(comparison).splitlines()
    assert table[0].split()[:2] == ["s/image", "s"]
    assert table[2].startswith("tenth")
    assert "9.4%" in table[2]
    assert f"{comparison.results[1].psnr:.1f} dB" in table[2]
    plain = json.loads(json.dumps(comparison.to_dict(), allow_nan=False))
    assert plain["steps"] == 3
    assert plain["results"][1]["config"] == SPARSE.to_dict()
    assert "frames" not in plain["results"][1]


def test_trained_projections_count():
    pipe = apply_sla(tiny_dit(), SPARSE)
    with torch.no_grad():
        for layer in sla_layers(pipe).values():
            layer.state.proj_l_weight.normal_()
    trained = sla_state(pipe)
    payload = {
        "format": "diffusers_sla", "version": 2, "settings": trained.settings, "state": trained.layers, "meta": {}
    }  # fmt: skip
    expected = generate(pipe, REQUEST).frames
    sparser = SLAConfig(topk=0.05, blkq=16, blkk=16)
    result = compare(
        tiny_dit(), REQUEST, [
            Variant(name="zero", config=SPARSE), Variant(name="trained", config=SPARSE, state=payload),
            Variant(name="sparser", config=sparser, state=payload),
        ], warm_up=False,
    )  # fmt: skip
    assert result.results[2].frames == expected
    assert result.results[1].frames != expected
    assert result.results[3].config == sparser


def test_a_lora_counts_in_its_variant_and_nowhere_else(tmp_path):
    pipe = tiny_dit()
    write_lora(pipe, tmp_path)
    weights = {name: (p.data_ptr(), p.data.clone()) for name, p in pipe.transformer.named_parameters()}
    plain = Variant(name="plain", config=SPARSE)
    trained = Variant(name="trained", config=SPARSE, lora=tmp_path)
    dense, with_lora, without = compare(pipe, REQUEST, [trained, plain], warm_up=False).results
    assert (
        dense.frames == compare(pipe, REQUEST, [], warm_up=False).dense.frames == generate(tiny_dit(), REQUEST).frames
    )
    assert without.frames == generate(apply_sla(tiny_dit(), SPARSE), REQUEST).frames
    expected = apply_sla(tiny_dit(), SPARSE)
    add_lora(expected, tmp_path)
    assert with_lora.frames == generate(expected, REQUEST).frames != without.frames
    for name, parameter in pipe.transformer.named_parameters():
        assert parameter.data_ptr() == weights[name][0]
        assert torch.equal(parameter, weights[name][1])


def test_an_error_in_a_variant_takes_its_lora_out(tmp_path):
    pipe = tiny_dit()
    write_lora(pipe, tmp_path)
    weight = pipe.transformer.transformer_blocks[0].attn1.to_q.weight
    before = weight.data_ptr()

    def stop(name, step, total):
        if name == "trained":
            assert weight.data_ptr() != before
            raise KeyboardInterrupt

    trained = Variant(name="trained", config=SPARSE, lora=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        compare(pipe, REQUEST, [trained], warm_up=False, on_progress=stop)
    assert weight.data_ptr() == before
    assert not sla_layers(pipe)


def test_calls_that_ran_dense_are_in_the_table():
    pipe = tiny_dit()
    attn = pipe.transformer.transformer_blocks[0].attn1
    bias = torch.zeros(1, 1024, 1024)  # a float mask is nothing that SLA could serve
    attn.register_forward_pre_hook(lambda m, args, kwargs: (args, kwargs | {"attention_mask": bias}), with_kwargs=True)
    result = compare(pipe, REQUEST, [Variant(name="tenth", config=SPARSE)], warm_up=False).results[1]
    assert list(result.dense_calls.values()) == [3]
    assert result.exact_share == pytest.approx((6 / 64 + 1) / 2)


@pytest.mark.parametrize(("dense_steps", "expected"), [([], 1), ([0, 1], 3), ([-1], 2), ([0, -1], 3), ([5], 1)])
def test_the_warm_up_is_long_enough_to_reach_sla(dense_steps, expected):
    assert _steps_to_warm_up(SLAConfig(dense_steps=dense_steps)) == expected


def test_steps_that_stay_dense_are_counted_and_named():
    config = SLAConfig(topk=0.1, blkq=16, blkk=16, dense_steps=[0])
    result = compare(tiny_dit(), REQUEST, [Variant(name="later", config=config)]).results[1]
    assert result.dense_calls == {"dense_steps": 2}
    assert result.exact_share == pytest.approx((2 * 6 / 64 + 1) / 3)


def test_layers_that_stay_native_count_as_in_the_dense_run():
    config = SLAConfig(topk=0.1, blkq=16, blkk=16, dense_layers=[0])
    dense, half = compare(tiny_dit(), REQUEST, [Variant(name="half", config=config)], warm_up=False).results
    assert half.exact_share == pytest.approx((6 / 64 + 1) / 2)
    assert half.attention_flops == 3 * dense_flops(1, 2, 1024, 1024, 8) + 3 * sla_flops(config, 1, 2, 1024, 1024, 8)
    assert half.attention_calls == 3
    assert half.dense_calls == {}
    assert dense.attention_calls == 6


def test_installed_sla_is_not_thrown_away():
    pipe = apply_sla(tiny_dit(), SPARSE)
    with pytest.raises(SLAError, match=r"remove_sla\(pipe\) first"):
        compare(pipe, REQUEST, [])
    assert len(sla_layers(pipe)) == 2


def test_an_end_in_the_middle_leaves_no_sla():
    pipe = tiny_dit()

    def stop(name, step, total):
        if name != "dense":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(pipe, REQUEST, [Variant(name="tenth", config=SPARSE)], warm_up=False, on_progress=stop)
    assert not sla_layers(pipe)


def test_psnr_and_ssim_by_hand():
    grey, lighter = Image.new("RGB", (16, 16), (100,) * 3), Image.new("RGB", (16, 16), (110,) * 3)
    assert psnr([grey], [grey]) == math.inf
    assert psnr([grey], [lighter]) == pytest.approx(20 * math.log10(255 / 10))
    assert psnr([grey, grey], [grey, lighter]) == pytest.approx(20 * math.log10(255 / 10) + 10 * math.log10(2))
    assert ssim([grey], [grey]) == 1.0
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8))
    assert ssim([grey, grey], [grey, noise]) == pytest.approx((1 + ssim([grey], [noise])) / 2)
