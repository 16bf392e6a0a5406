import json
from types import SimpleNamespace

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from models import make, output
from pipelines import make_pipeline, vae
from torch import nn

from diffusers_sla import SLAConfig, apply_sla, record, sla_disabled, sla_layers, sla_report
from diffusers_sla.report import LayerReport, SLAReport
from diffusers_sla.report_picture import _calls, _summary, block_shares, kept_share, report_picture

SPARSE = SLAConfig(topk=0.25, blkq=16, blkk=16)


def test_a_processor_that_was_set_in_slas_place_is_named():
    model, _ = make("unet")
    apply_sla(model, SPARSE)
    key = "mid_block.attentions.0.transformer_blocks.0.attn1.processor"
    model.set_attn_processor(model.attn_processors | {key: AttnProcessor()})
    layers = sla_report(model).layers
    assert (
        layers[f"unet.{key.removesuffix('.processor')}"].why == "AttnProcessor was set in SLA's place: apply SLA again"
    )
    assert sum(layer.runs == "sla" for layer in layers.values()) == 3
    assert {layer.why for name, layer in layers.items() if ".attn2" in name} == {"not self-attention over the image"}


@pytest.mark.parametrize("model", [vae(), nn.Linear(2, 2)], ids=lambda model: type(model).__name__)
def test_a_model_with_nothing_to_serve_gets_a_verdict(model):
    report = sla_report(model)
    assert str(report) == f"transformer: {type(model).__name__}: nothing for SLA to serve"
    assert report.layers == {}
    assert list(sla_report(make_pipeline("sd")).models) == ["unet"]  # beside a denoiser they go without saying


@pytest.mark.parametrize("way", ["wrapped", "in place", "blocks"])
@torch.no_grad()
def test_calls_that_compiled_graphs_hide_are_told_of(way):
    torch._dynamo.reset()
    model, inputs = make("flux")
    compiled = torch.compile(model, backend="eager") if way == "wrapped" else model
    if way == "in place":
        model.compile(backend="eager")
    elif way == "blocks":
        model.compile_repeated_blocks(backend="eager")
    served = "FluxTransformer2DModel: served"
    assert sla_report(compiled).models == {"transformer": served}
    plain, _ = make("flux")
    assert sla_report(apply_sla(plain, SPARSE)).models == {"transformer": served}  # nothing counted, nothing compiled
    apply_sla(model, SPARSE)
    output(compiled, inputs)
    report = sla_report(compiled)
    assert {layer.calls_sla for layer in report.layers.values()} == {0}
    told = {"transformer": f"{served}; compiled: calls inside its graphs are not counted"}
    assert report.models == told
    assert sla_report(SimpleNamespace(components={"transformer": compiled})).models == told
    with torch.compiler.set_stance("force_eager"):
        output(compiled, inputs)
    report = sla_report(compiled)
    assert {layer.calls_sla for layer in report.layers.values()} == {1}
    assert report.models == {"transformer": served}


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


def test_the_picture_counts_one_as_one():
    once, twice = LayerReport("sla", calls_sla=1), LayerReport("sla", calls_sla=2)
    assert [_calls(once), _calls(twice)] == ["1 call SLA", "2 calls SLA"]
    layers = {"a": LayerReport("native", "x"), "b": LayerReport("native", "y"), "c": LayerReport("native", "y")}
    assert _summary(SLAReport({"unet": "served"}, layers)) == [
        "unet: served",
        "1 layer native: x",
        "2 layers native: y",
    ]
