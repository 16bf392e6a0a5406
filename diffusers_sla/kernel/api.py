"""sla_attention and select_blocks: the contract, the checks, and the choice of implementation."""

import math
import numbers

import torch

from .reference import block_map_reference, block_scores_reference, check_chosen, sla_attention_reference

FEATURE_MAPS = ("softmax", "elu", "relu", "hedgehog")
LINEAR_MODES = ("all", "marginal", "none")
BLOCK_SIZES = (16, 32, 64, 128)
MAX_HEAD_DIM = 256
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
COUNTS, NUMBERS = {int, torch.SymInt}, (int, float, torch.SymInt, torch.SymFloat)


def sla_attention(
    q, k, v, *, topk=0.2, blkq=64, blkk=64, feature_map="softmax", linear="all", skip=0.0, scale=None,
    proj_l_weight=None, proj_l_bias=None, proj_s_weight=None, phi_q_weight=None, phi_k_weight=None,
    key_mask=None, keep_q=(0, 0), keep_k=(0, 0), is_causal=False, block_map=None, impl="auto",
):  # fmt: skip
    """Sparse-linear attention (Zhang et al. 2025, arXiv:2509.24006, eqs. 2-6), differentiable.

    `O = O_s A^T + O_l W^T + b`. O_s is softmax attention over the key blocks each query block kept; O_l is linear
    attention over `linear`; A is `proj_s_weight` (absent: identity), W and b are `proj_l_*` (W absent: no O_l).
    A query whose keys are all masked gives 0 for O_s, an empty linear sum gives 0 for O_l.

    Args:
        q: [B, H, Lq, D], float32, float16 or bfloat16 (float64 with impl="reference"), D <= 256, unit last stride.
        k, v: [B, Hkv, Lk, D] like q; Hkv divides H, and head h reads key head h // (H // Hkv).
        topk: Share of key blocks each query block attends to exactly, in (0, 1]; at least one block.
        blkq, blkk: Queries and keys per block: 16, 32, 64 or 128. The last block may be ragged.
        feature_map: "softmax" (over D), "elu" (elu + 1), "relu" or "hedgehog" (softmax of [xM, -xM]).
        linear: "all" key blocks, the "marginal" ones of each query block, or "none".
        skip: Share of key blocks of lowest score that are negligible, in [0, 1).
        scale: Factor on q . k in the sparse branch, default D ** -0.5.
        proj_l_weight, proj_s_weight: [D, D]. proj_l_bias: [D]. Any float dtype, float32 by habit.
        phi_q_weight, phi_k_weight: M [D, D] of "hedgehog" for q and for k; None for the others.
        key_mask: [B, Lk] bool, True where the key is real. A masked key is neither selected, pooled, summed nor
            attended to.
        keep_q, keep_k: (first, last) numbers of tokens that are never approximated, text in joint attention: these
            queries attend to every key and get neither A, W nor b; these keys are attended to by every query, and
            are neither in a block nor in the linear branch. Blocks are cut on what lies between.
        is_causal: Must be False: a block chosen as a whole has no causal form.
        block_map: [B, H, ceil(q tokens / blkq), ceil(k tokens / blkk)] int8 from `select_blocks`: 1 critical,
            0 marginal, -1 negligible; every row has max(1, int(topk * num_k_blocks)) ones, which the kernels assert
            on a GPU when it gets there. None: chosen here.
        impl: "triton" (GPU, or any device under TRITON_INTERPRET=1), "eager" (plain torch, any device, memory
            linear in L), "reference" (dense, the definition), or "auto": triton for GPU tensors, eager otherwise.

    Returns:
        [B, H, Lq, D] in q's dtype, with q's order of strides. No gradient flows through the choice of blocks.

    Raises:
        ValueError, TypeError: An argument is outside of the above; the message names it.
    """
    q, k, v = _autocast(q, k, v)
    _check_tensors(q, k, v, impl)
    _check_settings(topk, blkq, blkk, feature_map, linear, skip, scale, is_causal)
    D = q.shape[-1]
    for name, weight in (("proj_l_weight", proj_l_weight), ("proj_s_weight", proj_s_weight)):
        _check_weight(name, weight, (D, D), q)
    _check_weight("proj_l_bias", proj_l_bias, (D,), q)
    if proj_l_bias is not None and proj_l_weight is None:
        raise ValueError("proj_l_bias needs proj_l_weight")
    for name, weight in (("phi_q_weight", phi_q_weight), ("phi_k_weight", phi_k_weight)):
        _check_weight(name, weight, (D, D), q)
        if (weight is not None) != (feature_map == "hedgehog") and proj_l_weight is not None and linear != "none":
            given = "none" if weight is None else "one"
            raise ValueError(f"{name} goes with feature_map 'hedgehog' only: {feature_map!r} was given with {given}")
    _check_keys(q, k, key_mask, keep_q, keep_k)
    _check_block_map(q, k, block_map, topk, blkq, blkk, keep_q, keep_k)

    return _attention(impl, q)(
        q, k, v, topk=topk, blkq=blkq, blkk=blkk, feature_map=feature_map, linear=linear, skip=skip, scale=scale,
        proj_l_weight=proj_l_weight, proj_l_bias=proj_l_bias, proj_s_weight=proj_s_weight,
        phi_q_weight=phi_q_weight, phi_k_weight=phi_k_weight,
        key_mask=key_mask, keep_q=tuple(keep_q), keep_k=tuple(keep_k), block_map=block_map,
    )  # fmt: skip


def _attention(impl, q):
    impl = _resolve(impl, q)
    if impl == "triton":
        from .sparse import sla_attention_triton

        return sla_attention_triton
    if impl == "eager":
        from .eager import sla_attention_eager

        return sla_attention_eager
    return sla_attention_reference


def select_blocks(q, k, *, topk=0.2, blkq=64, blkk=64, skip=0.0, scale=None, key_mask=None, keep_q=(0, 0), keep_k=(0, 0), impl="auto"):  # fmt: skip  # noqa: E501
    """The choice of `sla_attention`: [B, H, num_q_blocks, num_k_blocks] int8, 1 critical, 0 marginal, -1 negligible.

    Score: mean of each query block . mean of each key block, scaled (eq. 2); the best max(1, int(topk * n)) blocks of
    a row are critical, the lowest int(skip * n) negligible (eq. 3). Arguments as in `sla_attention`.
    """
    q, k = _autocast(q, k)
    _check_tensors(q, k, k, impl)
    _check_settings(topk, blkq, blkk, "softmax", "all", skip, scale, False)
    _check_keys(q, k, key_mask, keep_q, keep_k)
    with torch.no_grad():
        impl = _resolve(impl, q)
        if impl == "reference":
            scores = block_scores_reference(q, k, blkq, blkk, scale, key_mask, keep_q, keep_k)
            return block_map_reference(scores, topk, skip)
        if impl == "eager":
            from .eager import select_blocks_eager

            return select_blocks_eager(q, k, topk, blkq, blkk, skip, scale, key_mask, keep_q, keep_k)
        from .sparse import select_blocks_triton

        return select_blocks_triton(q, k, topk, blkq, blkk, skip, scale, key_mask, keep_q, keep_k)


def _autocast(*tensors):
    """What F.scaled_dot_product_attention does with its inputs under torch.autocast."""
    if not isinstance(tensors[0], torch.Tensor) or not torch.is_autocast_enabled(tensors[0].device.type):
        return tensors
    if not all(isinstance(x, torch.Tensor) for x in tensors):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)


def _resolve(impl, q):
    if impl == "auto":
        return "triton" if q.is_cuda else "eager"
    return impl


def _check_tensors(q, k, v, impl):
    if impl not in ("auto", "triton", "eager", "reference"):
        raise ValueError(f"impl must be 'auto', 'triton', 'eager' or 'reference', got {impl!r}")
    shapes = []
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        shape = x.shape  # once: each time makes a new one
        if len(shape) != 4:
            raise ValueError(f"{name} must have 4 dimensions [B, H, L, D], got shape {tuple(shape)}")
        if 0 in shape:
            raise ValueError(f"{name} must not be empty, got shape {tuple(shape)}")
        if x is not q and (x.dtype != q.dtype or x.device != q.device):
            raise ValueError(f"{name} must be {q.dtype} on {q.device} like q, got {x.dtype} on {x.device}")
        if x.stride(-1) != 1 and shape[-1] != 1:
            raise ValueError(f"{name} must have unit stride in its last dimension, got strides {x.stride()}")
        shapes.append(shape)
    allowed = DTYPES if impl != "reference" else (*DTYPES, torch.float64)
    if q.dtype not in allowed:
        raise TypeError(f"q must be one of {', '.join(map(str, allowed))}, got {q.dtype}")
    (B, H, _, D), k_shape, v_shape = shapes
    if k_shape != v_shape:
        raise ValueError(f"k and v must have the same shape, got {tuple(k_shape)} and {tuple(v_shape)}")
    if k_shape[0] != B or k_shape[3] != D:
        raise ValueError(f"k must have q's batch and head size, got {tuple(k_shape)} for q {tuple(q.shape)}")
    if H % k_shape[1]:
        raise ValueError(f"the number of key heads must divide the number of query heads, got {k_shape[1]} for {H}")
    if D > MAX_HEAD_DIM:
        raise ValueError(f"the head size D must be at most {MAX_HEAD_DIM}, got {D}")


def _check_settings(topk, blkq, blkk, feature_map, linear, skip, scale, is_causal):
    for name, number in (("topk", topk), ("skip", skip), ("scale", 0.0 if scale is None else scale)):
        if not isinstance(number, NUMBERS) and not isinstance(number, numbers.Real):  # the second is slow
            raise TypeError(f"{name} must be a number, got {number!r}")
    if not 0 < topk <= 1:
        raise ValueError(f"topk must be in (0, 1], got {topk}")
    if not 0 <= skip < 1:
        raise ValueError(f"skip must be in [0, 1), got {skip}")
    if topk + skip > 1:
        raise ValueError(f"topk + skip must not exceed 1, got {topk} + {skip}")
    for name, block in (("blkq", blkq), ("blkk", blkk)):
        if type(block) is not int or block not in BLOCK_SIZES:  # 64.0 is among them
            raise ValueError(f"{name} must be one of the ints {BLOCK_SIZES}, got {block!r}")
    if feature_map not in FEATURE_MAPS:
        raise ValueError(f"feature_map must be one of {FEATURE_MAPS}, got {feature_map!r}")
    if linear not in LINEAR_MODES:
        raise ValueError(f"linear must be one of {LINEAR_MODES}, got {linear!r}")
    if scale is not None and not -math.inf < scale < math.inf:  # math.isfinite takes no traced number
        raise ValueError(f"scale must be finite, got {scale}")
    if is_causal:
        raise ValueError("is_causal must be False: SLA chooses whole blocks of keys and has no causal form")


def _check_weight(name, weight, shape, q):
    if weight is None:
        return
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
        raise TypeError(f"{name} must be a tensor of a float dtype, got {getattr(weight, 'dtype', weight)!r}")
    if tuple(weight.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(weight.shape)}")
    if weight.device != q.device:
        raise ValueError(f"{name} must be on {q.device} like q, got {weight.device}")


def _check_keys(q, k, key_mask, keep_q, keep_k):
    if key_mask is not None:
        shape = (k.shape[0], k.shape[2])
        if not isinstance(key_mask, torch.Tensor):
            raise TypeError(f"key_mask must be a bool tensor of shape {shape}, got {type(key_mask).__name__}")
        if tuple(key_mask.shape) != shape or key_mask.dtype != torch.bool:
            raise ValueError(f"key_mask must be bool of shape {shape}, got {key_mask.dtype} {tuple(key_mask.shape)}")
        if key_mask.device != q.device:
            raise ValueError(f"key_mask must be on {q.device} like q, got {key_mask.device}")
    for name, keep, x in (("keep_q", keep_q, q), ("keep_k", keep_k, k)):
        if not isinstance(keep, (tuple, list)) or not COUNTS.issuperset(map(type, keep)):  # True is an int, too
            raise TypeError(f"{name} must be two ints, got {keep!r}")
        if len(keep) != 2 or min(keep) < 0 or sum(keep) >= x.shape[2]:
            raise ValueError(f"{name} must be two counts >= 0 that leave a token of {x.shape[2]} between, got {keep}")


def _check_block_map(q, k, block_map, topk, blkq, blkk, keep_q, keep_k):
    if block_map is None:
        return
    rows, cols = -(-(q.shape[2] - sum(keep_q)) // blkq), -(-(k.shape[2] - sum(keep_k)) // blkk)
    shape = (q.shape[0], q.shape[1], rows, cols)
    if not isinstance(block_map, torch.Tensor):
        raise TypeError(f"block_map must be an int8 tensor of shape {shape}, got {type(block_map).__name__}")
    if tuple(block_map.shape) != shape or block_map.dtype != torch.int8:
        raise ValueError(f"block_map must be int8 of shape {shape}, got {block_map.dtype} {tuple(block_map.shape)}")
    if block_map.device != q.device:
        raise ValueError(f"block_map must be on {q.device} like q, got {block_map.device}")
    # What is traced cannot look, the kernels' side does where they run.
    if not block_map.is_cuda and not torch.compiler.is_compiling() and type(block_map) is torch.Tensor:
        check_chosen(block_map, topk)
