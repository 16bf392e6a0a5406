import pytest
import torch

from diffusers_sla.kernel import select_blocks, sla_attention

X = torch.zeros(1, 2, 32, 16)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": X[0]}, ValueError, r"q must have 4 dimensions \[B, H, L, D\], got shape \(2, 32, 16\)"),
        ({"v": X[:, :, :16]}, ValueError, "k and v must have the same shape"),
        ({"k": X.half(), "v": X.half()}, ValueError, "k must be torch.float32 on cpu like q, got torch.float16"),
        ({"k": X[:, :0], "v": X[:, :0]}, ValueError, "must not be empty"),
        ({"topk": 0}, ValueError, r"topk must be in \(0, 1\], got 0"),
        ({"topk": 1.5}, ValueError, r"topk must be in \(0, 1\], got 1.5"),
        ({"topk": float("nan")}, ValueError, r"topk must be in \(0, 1\], got nan"),
        ({"skip": 0.9}, ValueError, "topk \\+ skip must not exceed 1"),
        ({"blkq": 48}, ValueError, "blkq must be one of .*, got 48"),
        ({"feature_map": "gelu"}, ValueError, "feature_map must be one of .*, got 'gelu'"),
        ({"linear": "some"}, ValueError, "linear must be one of .*, got 'some'"),
        ({"is_causal": True}, ValueError, "is_causal must be False"),
        ({"scale": float("inf")}, ValueError, "scale must be finite"),
        ({"impl": "cuda"}, ValueError, "impl must be .*, got 'cuda'"),
        ({"proj_l_weight": torch.zeros(8, 8)}, ValueError, r"proj_l_weight must have shape \(16, 16\), got \(8, 8\)"),
        ({"proj_l_bias": torch.zeros(16)}, ValueError, "proj_l_bias needs proj_l_weight"),
        ({"key_mask": torch.ones(1, 8, dtype=torch.bool)}, ValueError, r"key_mask must be bool of shape \(1, 32\)"),
        (
            {"key_mask": torch.ones(1, 32, dtype=torch.bool, device="meta")},
            ValueError,
            "key_mask must be on cpu like q, got meta",
        ),
        (
            {"block_map": torch.zeros(1, 2, 1, 1, dtype=torch.int8, device="meta")},
            ValueError,
            "block_map must be on cpu like q, got meta",
        ),
        ({"keep_q": (16, 16)}, ValueError, "keep_q must be two counts"),
        ({"block_map": torch.zeros(1, 2, 9, 9, dtype=torch.int8)}, ValueError, "block_map must be int8 of shape"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    with pytest.raises(error, match=message):
        sla_attention(**({"q": X, "k": X, "v": X} | change))


def test_a_head_over_256_is_refused():
    x = torch.zeros(1, 1, 16, 257)
    with pytest.raises(ValueError, match="the head size D must be at most 256, got 257"):
        sla_attention(x, x, x)


def test_only_the_definition_takes_float64():
    x = X.double()
    with pytest.raises(TypeError, match=r"q must be one of .*, got torch\.float64"):
        sla_attention(x, x, x)


def test_the_choice_checks_its_arguments_too():
    with pytest.raises(ValueError, match=r"topk must be in \(0, 1\], got 2"):
        select_blocks(X, X, topk=2)
