"""The Triton path: what joins forward, backward, selection and linear branch, and its autograd, twice over.

Traced (torch.compile, export) it is a pair of custom ops, which have fake versions and are opaque to the tracer.
Otherwise the same two functions run directly under an autograd.Function: a custom op's dispatch takes longer on the
host than the kernels do at image sizes.
"""

import functools
from typing import List, Optional, Tuple

import torch
from torch import Tensor

from ._ops import add_op_namespace_prefix
from .backward import sparse_bwd
from .forward import num_rows, sparse_fwd
from .linear import EPS, gather_sums, linear_bwd_k, linear_bwd_q, norm_of, scatter_sums_backward
from .selection import indices_of, invert, prepare, select


def _on_its_device(function):
    """Triton launches on the current GPU, which need not be the one of a model that is spread over several."""

    @functools.wraps(function)
    def on_device(first, *rest):
        with torch.cuda.device_of(first):
            return function(first, *rest)

    return on_device


def sla_attention_triton(
    q, k, v, *, topk, blkq, blkk, feature_map, linear, skip, scale,
    proj_l_weight, proj_l_bias, proj_s_weight, phi_q_weight, phi_k_weight,
    key_mask, keep_q, keep_k, block_map,
):  # fmt: skip
    """`sla_attention` by the kernels. All arguments as there, all required."""
    if q.dtype == torch.bfloat16 and not q.is_cuda:
        raise TypeError("Triton's interpreter multiplies bfloat16 matrices wrongly; use float32 or float16 there")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if linear == "none" or proj_l_weight is None:
        linear = "none"
        proj_l_weight = proj_l_bias = phi_q_weight = phi_k_weight = None
    if feature_map != "hedgehog":
        phi_q_weight = phi_k_weight = None
    inputs = (q, k, v, proj_l_weight, proj_l_bias, proj_s_weight, phi_q_weight, phi_k_weight)
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    arguments = (
        *inputs, key_mask, block_map, topk, skip, scale, blkq, blkk, feature_map, linear, [*keep_q, *keep_k], save
    )  # fmt: skip
    if torch.compiler.is_compiling() or type(q) not in (Tensor, torch.nn.Parameter):
        return _forward(*arguments)[0]
    return _Direct.apply(*arguments) if save else _compute_forward(*arguments)[0]


@_on_its_device
def select_blocks_triton(q, k, topk, blkq, blkk, skip, scale, key_mask, keep_q, keep_k):
    """`select_blocks` by the kernels."""
    q_mean, k_mean, k_bias, _, _ = prepare(
        q, k, k, None, key_mask, blkq, blkk, keep_q, keep_k, "softmax", "none", True, 1.0
    )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return select(q_mean, k_mean, k_bias, topk, skip, scale, q.dtype)[1]


@_on_its_device
def _compute_forward(
    q, k, v, proj_l_weight, proj_l_bias, proj_s_weight, phi_q_weight, phi_k_weight, key_mask, block_map,
    topk, skip, scale, blkq, blkk, feature_map, linear, keep, save,
):  # fmt: skip
    """o, and when `save` what the backward needs: o_s, lse, indices, the block map if it was chosen here, and h and z
    if linear is "all"; None for the others."""
    keep_q, keep_k = tuple(keep[:2]), tuple(keep[2:])
    fq = None if phi_q_weight is None else q @ phi_q_weight.to(q.dtype)
    fk = None if phi_k_weight is None else k @ phi_k_weight.to(k.dtype)
    norm = norm_of(q, k)
    q_mean, k_mean, k_bias, sums, z = prepare(
        q, k, v, fk, key_mask, blkq, blkk, keep_q, keep_k, feature_map, linear, block_map is None, norm
    )
    if block_map is None:
        indices, chosen = select(q_mean, k_mean, k_bias, topk, skip, scale, q.dtype)
    else:
        indices, chosen = indices_of(block_map, topk), block_map
    m = h = None
    if linear != "none":
        m, z, h = gather_sums(sums, z, chosen if linear == "marginal" else None, proj_l_weight, q.dtype)
    o, o_s, lse = sparse_fwd(
        q, k, v, fq, indices, key_mask, m, z, proj_s_weight, proj_l_bias,
        blkq, blkk, keep_q, keep_k, feature_map, scale, EPS * norm, save,
    )  # fmt: skip
    if not save:
        return (o, *[None] * 6)
    sums = (h, z) if linear == "all" else (None, None)
    return (o, o_s, lse, indices, chosen if block_map is None else None, *sums)


@torch.library.custom_op(add_op_namespace_prefix("forward"), mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, proj_l_weight: Optional[Tensor], proj_l_bias: Optional[Tensor],
    proj_s_weight: Optional[Tensor], phi_q_weight: Optional[Tensor], phi_k_weight: Optional[Tensor],
    key_mask: Optional[Tensor], block_map: Optional[Tensor],
    topk: float, skip: float, scale: float, blkq: int, blkk: int, feature_map: str, linear: str,
    keep: List[int], save: bool,
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """_compute_forward with empty tensors for None."""
    outputs = _compute_forward(
        q, k, v, proj_l_weight, proj_l_bias, proj_s_weight, phi_q_weight, phi_k_weight, key_mask, block_map,
        topk, skip, scale, blkq, blkk, feature_map, linear, keep, save,
    )  # fmt: skip
    return tuple(q.new_empty(0) if x is None else x for x in outputs)


@_forward.register_fake
def _(
    q, k, v, proj_l_weight, proj_l_bias, proj_s_weight, phi_q_weight, phi_k_weight, key_mask, block_map,
    topk, skip, scale, blkq, blkk, feature_map, linear, keep, save,
):  # fmt: skip
    B, H, Lq, D = q.shape
    Hkv, Lk = k.shape[1], k.shape[2]
    o = torch.empty_like(q)
    if not save:
        return (o, *(q.new_empty(0) for _ in range(6)))
    num_q_blocks = (Lq - keep[0] - keep[1] + blkq - 1) // blkq
    num_k_blocks = (Lk - keep[2] - keep[3] + blkk - 1) // blkk
    n = torch.sym_max(1, torch.sym_int(topk * num_k_blocks))
    chosen = q.new_empty((B, H, num_q_blocks, num_k_blocks), dtype=torch.int8) if block_map is None else q.new_empty(0)
    features = 2 * D if feature_map == "hedgehog" else D
    sums = linear == "all"
    return (
        o, torch.empty_like(q), q.new_empty((B, H, num_rows(Lq, blkq)), dtype=torch.float32),
        q.new_empty((B, H, num_q_blocks, n), dtype=torch.int32), chosen,
        q.new_empty((B, Hkv, features, D), dtype=torch.float32) if sums else q.new_empty(0),
        q.new_empty((B, Hkv, 1, features), dtype=torch.float32) if sums else q.new_empty(0),
    )  # fmt: skip


@_on_its_device
def _compute_backward(
    do, q, k, v, proj_l_weight, proj_l_bias, proj_s_weight, phi_q_weight, phi_k_weight, key_mask, block_map,
    o_s, lse, indices, h, z, topk, scale, blkq, blkk, feature_map, linear, keep,
):  # fmt: skip
    """Gradients of q, k, v and the five weights; None where there is no such weight."""
    keep_q, keep_k = tuple(keep[:2]), tuple(keep[2:])
    image = slice(keep_q[0], q.shape[2] - keep_q[1])
    do = do.to(q.dtype)
    if do.stride(-1) != 1:
        do = do.contiguous()
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(k)
    dweight = dbias = da = dphi_q = dphi_k = None

    if linear != "none":
        norm = norm_of(q, k)
        hedgehog = phi_q_weight is not None
        fq = q @ phi_q_weight.to(q.dtype) if hedgehog else q
        fk = k @ phi_k_weight.to(k.dtype) if hedgehog else k
        dfq, dfk = (torch.zeros_like(fq), torch.zeros_like(fk)) if hedgehog else (dq, dk)
        marginal = block_map if linear == "marginal" else None
        sums = None
        if marginal is None:
            m = (h @ proj_l_weight.float().t()).to(q.dtype).unsqueeze(2)
        else:
            _, _, _, sums, z = prepare(
                q, k, v, fk, key_mask, blkq, blkk, keep_q, keep_k, feature_map, linear, False, norm
            )
            m, z, _ = gather_sums(sums, z, marginal, proj_l_weight, q.dtype)
        dm, dz, dbias = linear_bwd_q(fq, do, m, z, dfq, blkq, keep_q, feature_map, EPS * norm, marginal is not None)
        del m
        dh, dz, dweight = scatter_sums_backward(dm, dz, marginal, proj_l_weight, h, sums, k.shape[1], norm, q.dtype)
        del dm, sums
        linear_bwd_k(fk, v, key_mask, dh, dz, dfk, dv, blkk, keep_k, feature_map)
        if hedgehog:
            dphi_q = (q[:, :, image].mT @ dfq[:, :, image]).float().sum((0, 1))
            dphi_k = (k.mT @ dfk).float().sum((0, 1))
            dq.copy_(dfq @ phi_q_weight.to(q.dtype).t())
            dk.copy_(dfk @ phi_k_weight.to(k.dtype).t())
    do_s = do
    if proj_s_weight is not None:
        da = (do[:, :, image].mT @ o_s[:, :, image]).float().sum((0, 1))
        do_s = do @ proj_s_weight.to(q.dtype)
        do_s[:, :, : image.start] = do[:, :, : image.start]
        do_s[:, :, image.stop :] = do[:, :, image.stop :]
    sparse_bwd(
        do_s, q, k, v, o_s, lse, indices, invert(block_map, topk), key_mask, dq, dk, dv,
        blkq, blkk, keep_q, keep_k, scale, linear != "none",
    )  # fmt: skip
    weights = (proj_l_weight, proj_l_bias, proj_s_weight, phi_q_weight, phi_k_weight)
    gradients = (dweight, dbias, da, dphi_q, dphi_k)
    return (dq, dk, dv, *(None if w is None else gradient.to(w.dtype) for w, gradient in zip(weights, gradients)))


@torch.library.custom_op(add_op_namespace_prefix("backward"), mutates_args=())
def _backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, proj_l_weight: Optional[Tensor], proj_l_bias: Optional[Tensor],
    proj_s_weight: Optional[Tensor], phi_q_weight: Optional[Tensor], phi_k_weight: Optional[Tensor],
    key_mask: Optional[Tensor], block_map: Tensor, o_s: Tensor, lse: Tensor, indices: Tensor, h: Tensor, z: Tensor,
    topk: float, scale: float, blkq: int, blkk: int, feature_map: str, linear: str, keep: List[int],
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """_compute_backward with empty tensors for None."""
    outputs = _compute_backward(
        do, q, k, v, proj_l_weight, proj_l_bias, proj_s_weight, phi_q_weight, phi_k_weight, key_mask, block_map,
        o_s, lse, indices, h, z, topk, scale, blkq, blkk, feature_map, linear, keep,
    )  # fmt: skip
    return tuple(q.new_empty(0) if x is None else x for x in outputs)


@_backward.register_fake
def _(
    do, q, k, v, proj_l_weight, proj_l_bias, proj_s_weight, phi_q_weight, phi_k_weight, key_mask, block_map,
    o_s, lse, indices, h, z, topk, scale, blkq, blkk, feature_map, linear, keep,
):  # fmt: skip
    weights = (proj_l_weight, proj_l_bias, proj_s_weight, phi_q_weight, phi_k_weight)
    gradients = [q.new_empty(0) if weight is None else torch.empty_like(weight) for weight in weights]
    return (torch.empty_like(q), torch.empty_like(k), torch.empty_like(k), *gradients)


def _setup_context(ctx, inputs, output):
    *tensors, key_mask, block_map, topk, _skip, scale, blkq, blkk, feature_map, linear, keep, save = inputs
    ctx.saved = save
    if not save:
        return
    _, o_s, lse, indices, chosen, h, z = output
    ctx.save_for_backward(*tensors, key_mask, chosen if block_map is None else block_map, o_s, lse, indices, h, z)
    ctx.settings = (topk, scale, blkq, blkk, feature_map, linear, keep)


def _needed(ctx, saved, gradients):
    """Gradients of the forward's arguments: of the tensors that are there and want one, None for the others."""
    wanted = (x is not None and need for x, need in zip(saved, ctx.needs_input_grad))
    return (*(gradient if want else None for want, gradient in zip(wanted, gradients)), *([None] * 11))


def _differentiate(ctx, do, *_):
    if not ctx.saved:
        raise RuntimeError("this call of sla_attention kept nothing for a backward")
    saved = ctx.saved_tensors  # once: checkpointing hands each tensor out a single time
    return _needed(ctx, saved[:8], _backward(do, *saved, *ctx.settings))


def _setup_op_context(ctx, inputs, output):
    _setup_context(ctx, inputs, output)
    ctx.mark_non_differentiable(*output[1:])


_forward.register_autograd(_differentiate, setup_context=_setup_op_context)


class _Direct(torch.autograd.Function):
    """The two computations without the custom ops' dispatch."""

    @staticmethod
    def forward(ctx, *arguments):
        outputs = _compute_forward(*arguments)
        _setup_context(ctx, arguments, outputs)
        return outputs[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do):
        saved = ctx.saved_tensors
        return _needed(ctx, saved[:8], _compute_backward(do, *saved, *ctx.settings))
