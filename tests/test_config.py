import dataclasses
import enum
import json

import numpy as np
import pytest

from diffusers_sla import SLAConfig, SLAConfigError, SLAError


def test_defaults_are_those_of_the_design():
    assert (
        SLAConfig().to_dict() | {"topk": 0.2, "blkq": 64, "blkk": 64, "feature_map": "softmax"}
        == SLAConfig().to_dict()
    )
    assert (SLAConfig().linear, SLAConfig().skip, SLAConfig().tie_feature_map_qk) == ("all", 0.0, True)


@pytest.mark.parametrize(
    "text",
    [
        '{"topk":0.15,"blkq":32,"tie_feature_map_qk":false}',
        "{'topk': 0.15, 'blkq': 32, 'tie_feature_map_qk': False}",
    ],
)
def test_parse_reads_json_and_python_dicts(text):
    assert SLAConfig.parse(text) == SLAConfig(topk=0.15, blkq=32, tie_feature_map_qk=False)


def test_parse_takes_none_mappings_and_configs():
    config = SLAConfig(topk=0.1)
    assert SLAConfig.parse(None) == SLAConfig()
    assert SLAConfig.parse(config) is config
    assert SLAConfig.parse(config.to_dict()) == config


def test_what_is_not_named_is_the_bases():
    base = SLAConfig(topk=0.05, skip=0.9, blkq=32, dense_layers=(0,))
    assert SLAConfig.parse(None, base) is base
    assert SLAConfig.parse('{"skip": 0.95}', base) == SLAConfig(topk=0.05, skip=0.95, blkq=32, dense_layers=(0,))
    assert SLAConfig.parse(SLAConfig(), base) == SLAConfig()
    with pytest.raises(SLAConfigError, match=r"topk \+ skip must not exceed 1, got 0.2 \+ 0.9"):
        SLAConfig.parse({"topk": 0.2}, base)


@pytest.mark.parametrize("topk", [0, 1.5, -0.1, float("nan"), float("inf"), True, "0.2", None])
def test_topk_out_of_range_is_named(topk):
    with pytest.raises(SLAConfigError, match=r"topk must be a number in \(0, 1\], got "):
        SLAConfig(topk=topk)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"blkq": 48}, "blkq must be one of 16, 32, 64, 128, got 48"),
        ({"blkk": 64.0}, "blkk must be one of 16, 32, 64, 128, got 64.0"),
        ({"blkq": np.int64(32)}, "blkq must be one of 16, 32, 64, 128, got np.int64\\(32\\)"),
        ({"blkk": True}, "blkk must be one of 16, 32, 64, 128, got True"),
        ({"feature_map": "gelu"}, "feature_map must be one of softmax, elu, relu, hedgehog, got 'gelu'"),
        ({"linear": "some"}, "linear must be one of all, marginal, none, got 'some'"),
        ({"skip": 1.0}, "skip must be a number in"),
        ({"topk": 0.6, "skip": 0.5}, "topk \\+ skip must not exceed 1"),
        ({"tie_feature_map_qk": 1}, "tie_feature_map_qk must be true or false, got 1"),
        ({"top_k": 0.2}, "unknown SLA setting 'top_k'; known are topk, blkq"),
    ],
)
def test_bad_settings_name_the_setting_the_value_and_what_is_allowed(settings, message):
    with pytest.raises(SLAConfigError, match=message):
        SLAConfig.parse(settings)


@pytest.mark.parametrize("text", ["{topk: 0.2", "topk=0.2", '{"topk": 0.2', "__import__('os').getcwd()"])
def test_malformed_text_shows_the_text_and_an_example(text):
    with pytest.raises(SLAConfigError, match="neither JSON nor a Python dict") as raised:
        SLAConfig.parse(text)
    assert text in str(raised.value)
    assert '{"topk": 0.15, "blkq": 32}' in str(raised.value)


def test_a_config_is_frozen_and_its_error_is_a_value_error():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SLAConfig().topk = 0.5
    assert issubclass(SLAConfigError, SLAError)
    assert issubclass(SLAConfigError, ValueError)


@pytest.mark.parametrize(
    ("setting", "value", "what"),
    [
        ("dense_layers", 3, "a list of numbers or paths"), ("dense_layers", [1.5], "a list of numbers or paths"),
        ("dense_steps", ["0"], "a list of numbers"), ("dense_steps", [True], "a list of numbers"),
        ("min_length", -1, "an integer >= 0"), ("min_length", 1.5, "an integer >= 0"),
    ],
)  # fmt: skip
def test_schedules_out_of_range_are_named(setting, value, what):
    with pytest.raises(SLAConfigError, match=f"{setting} must be {what}, got "):
        SLAConfig(**{setting: value})


def test_schedules_are_plain_lists_in_files_and_hashable_here():
    config = SLAConfig(dense_layers=[0, -1, "blocks.3.attn1"], dense_steps=[0])
    assert config.to_dict()["dense_layers"] == [0, -1, "blocks.3.attn1"]
    assert SLAConfig.parse(config.to_dict()) == config
    assert len({config, SLAConfig.parse(config.to_dict())}) == 1


def test_text_may_be_a_member_of_an_enumeration():
    class Phi(enum.StrEnum):
        ELU = "elu"

    assert json.dumps(SLAConfig(feature_map=Phi.ELU).to_dict()["feature_map"]) == '"elu"'
