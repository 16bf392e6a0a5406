import json

import pytest
import torch
from models import make, output

from diffusers_sla import SLAConfig, apply_sla, record, sla_disabled, sla_layers, sla_report
from diffusers_sla.report_picture import block_shares, kept_share, report_picture

SPARSE = SLAConfig(topk=0.25, blkq=16, blkk=16)


def test_a_processor_that_was_set_in_slas_place_is_named():
    model, _ = make("unet")
    apply_sla(model, SPARSE)
    model.set_attention_slice("auto")
    whys = {layer.why for layer in sla_report(model).layers.values()}
    assert whys == {"SlicedAttnProcessor was set in SLA's place: apply SLA again", "not self-attention over the image"}


@torch.no_grad()
def test_the_table_counts_what_ran_and_names_why_not():
    model, inputs = make("flux")
    apply_sla(model, SLAConfig(topk=0.25, blkq=16, blkk=16, dense_layers=[1]))
    output(model, inputs)
    with sla_disabled(model):
        output(model, inputs)
    report = sla_report(model)
    assert report.models == {"transformer": "FluxTransformer2DModel: served"}
    assert json.loads(report.to_json())["layers"]["transformer.transformer_blocks.0.attn"] == {
        "runs": "sla", "why": "", "calls_sla": 1, "calls_dense": {"disabled": 1}, "frozen": False,
    }  # fmt: skip
    assert str(report).splitlines() == [
        "transformer: FluxTransformer2DModel: served",
        "layer                                         runs    SLA calls  dense calls",
        "transformer.transformer_blocks.0.attn         sla     1          1 (disabled)",
        "transformer.single_transformer_blocks.0.attn  native  0          - (dense_layers)",
    ]


def test_before_sla_every_layer_is_native():
    report = sla_report(make("wan")[0])
    whys = {name.rpartition(".")[2]: layer.why for name, layer in report.layers.items()}
    assert whys == {"attn1": "SLA is not installed", "attn2": "not self-attention over the image"}
    assert {layer.runs for layer in report.layers.values()} == {"native"}


@pytest.mark.parametrize("name", ["wan", "flux", "prx"])
@torch.no_grad()
def test_the_share_kept_counts_text_and_ragged_blocks(name):
    model, inputs = make(name)
    apply_sla(model, SPARSE)
    with record(model) as records:
        output(model, inputs)
    r = records[0]
    shares = block_shares(r)
    tokens = {"wan": (128, 128), "flux": (64, 64), "prx": (64, 64)}[name]
    assert shares.shape == (tokens[0] // 16, tokens[1] // 16)
    torch.testing.assert_close(shares.sum(1), torch.full((len(shares),), float(max(1, len(shares) // 4))))
    text_q, text_k = sum(r.kept), sum(r.kept_keys)
    exact = tokens[0] * tokens[1] / 4 + text_q * (text_k + tokens[1]) + tokens[0] * text_k
    assert kept_share(r) == pytest.approx(exact / ((text_q + tokens[0]) * (text_k + tokens[1])), rel=1e-5)


@torch.no_grad()
def test_the_picture_has_a_map_for_each_recorded_layer():
    pytest.importorskip("matplotlib")
    model, inputs = make("unet")
    apply_sla(model, SPARSE)
    with record(model) as records:
        output(model, inputs)
    report = sla_report(model)
    with_maps, without = report_picture(report, records), report_picture(report)
    assert with_maps.size[0] > 900
    assert with_maps.size == without.size
    colours = [len(set(image.convert("RGB").getdata())) for image in (with_maps, without)]
    assert len(sla_layers(model)) == 4
    assert colours[0] > colours[1]
    blue = [sum(b > r + 60 for r, _, b in image.convert("RGB").getdata()) for image in (with_maps, without)]
    assert blue[0] > 4 * 1000
    assert blue[1] == 0
