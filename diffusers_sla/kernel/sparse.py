"""The Triton path: what joins forward, backward, selection and linear branch, and its autograd, twice over.

Traced (torch.compile, export) it is a pair of custom ops, which have fake versions and are opaque to the tracer.
Otherwise the same two functions run directly under an autograd.Function: a custom op's dispatch takes longer on the
host than the kernels do at image sizes. So does all else that Python does for a launch: calls whose steps are launches
only repeat a plan (plan.py).
"""

import functools
from typing import List, Optional, Tuple

import torch
import triton
from torch import Tensor

from ._ops import add_op_namespace_prefix
from .backward import sparse_bwd
from .derivatives import first_derivative_only
from .features import HALVES
from .forward import _sparse_fwd_kernel, num_rows, sparse_fwd, statistics
from .linear import EPS, gradient_dtype, linear_bwd_k, linear_bwd_q, norm_of
from .marginal import gather_marginal, scatter_marginal
from .plan import Now, Parts, Plan, layout, like, planned
from .prepare import prepare
from .projection import project_sums
from .reference import check_chosen
from .selection import indices_of, select

PLAIN = {Tensor, torch.nn.Parameter, type(None)}  # others may have their numbers elsewhere than at data_ptr
INTERPRETED = not isinstance(_sparse_fwd_kernel, triton.JITFunction)


def _on_its_device(function):
    """Triton launches on the current GPU, which need not be the one of a model that is spread over several."""

    @functools.wraps(function)
    def on_device(first, *rest):
        if not first.is_cuda or first.get_device() == torch.cuda.current_device():
            return function(first, *rest)
        with torch.cuda.device_of(first):
            return function(first, *rest)

    return on_device


def sla_attention_triton(
    q, k, v, *, topk, blkq, blkk, feature_map, linear, skip, scale,
    proj_l_weight, proj_l_bias, proj_s_weight, phi_q_weight, phi_k_weight,
    key_mask, keep_q, keep_k, block_map,
):  # fmt: skip
    """`sla_attention` by the kernels. All arguments as there, all required."""
    _check_device(q)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if linear == "none" or proj_l_weight is None:
        linear = "none"
        proj_l_weight = proj_l_bias = phi_q_weight = phi_k_weight = None
    if feature_map != "hedgehog":
        phi_q_weight = phi_k_weight = None
    given = (proj_l_weight, proj_l_bias, proj_s_weight, phi_q_weight, phi_k_weight, key_mask, block_map)
    tensors = (q, k, v, *(None if x is None else x.contiguous() for x in given))
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    settings = (topk, skip, scale, blkq, blkk, feature_map, linear, (*keep_q, *keep_k))
    if torch.compiler.is_compiling() or not PLAIN.issuperset(map(type, tensors)):
        return _forward(*tensors, *settings[:-1], list(settings[-1]), save)[0]
    if save or torch.autograd.forward_ad._current_level >= 0:  # whose tangents an autograd.Function refuses
        return _Direct.apply(*tensors, settings)
    return _compute_forward(*tensors, *settings, False)[0]


def _check_device(q):
    if q.is_cuda:
        return
    if not INTERPRETED:
        raise ValueError(f"impl 'triton' needs tensors on a GPU, or TRITON_INTERPRET=1 from the start, got {q.device}")
    if q.dtype == torch.bfloat16:
        raise TypeError("Triton's interpreter multiplies bfloat16 matrices wrongly; use float32 or float16 there")


def select_blocks_triton(q, k, topk, blkq, blkk, skip, scale, key_mask, keep_q, keep_k):
    """`select_blocks` by the kernels."""
    _check_device(q)
    key_mask = None if key_mask is None else key_mask.contiguous()
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return _select(q, k, key_mask, topk, skip, scale, blkq, blkk, [*keep_q, *keep_k])


@torch.library.custom_op(add_op_namespace_prefix("select"), mutates_args=())
@_on_its_device
def _select(
    q: Tensor, k: Tensor, key_mask: Optional[Tensor], topk: float, skip: float, scale: float, blkq: int, blkk: int,
    keep: List[int],
) -> Tensor:  # fmt: skip
    run = Now(q.device)
    q_mean, k_mean, k_bias, _, _ = prepare(
        run, q, k, k, None, key_mask, blkq, blkk, tuple(keep[:2]), tuple(keep[2:]), "softmax", "none", True, 1.0
    )
    rows, num_k_blocks = q_mean.shape[:3], k_mean.shape[2]
    indices = run.empty((*rows, max(1, int(topk * num_k_blocks))), torch.int32)
    block_map = run.empty((*rows, num_k_blocks), torch.int8)
    select(run, q_mean, k_mean, k_bias, skip, scale, q.dtype, indices, block_map)
    return block_map


@_select.register_fake
def _(q, k, key_mask, topk, skip, scale, blkq, blkk, keep):
    parts = Parts(q.device)
    block_map = _kept(parts, q, k, topk, blkq, blkk, "softmax", "none", keep, False, True)[3]
    return q.new_empty(block_map.shape, dtype=torch.int8)


def _kept(parts, o, k, topk, blkq, blkk, feature_map, linear, keep, save, choose):
    """The tensors that a forward leaves to its backward, one after the other in `parts`; None for those there are not.

    o_s [B, H, Lq, D] and lse when `save`; indices [B, H, num_q_blocks, n] int32; the block map when `choose`; m [B,
    Hkv, 1, F, D], h [B, Hkv, F, D] and z [B, Hkv, 1, F] when every block is summed. They lie where shapes alone say,
    as hooks on what autograd saves may give q back with other strides.
    """
    (B, H, Lq, D), (Hkv, Lk) = o.shape, k.shape[1:3]
    num_q_blocks = (Lq - keep[0] - keep[1] + blkq - 1) // blkq
    num_k_blocks = (Lk - keep[2] - keep[3] + blkk - 1) // blkk
    n = torch.sym_max(1, torch.sym_int(topk * num_k_blocks))
    F, sums = HALVES[feature_map] * D, linear == "all"
    return (
        parts.add(o.shape, o.dtype) if save else None,
        parts.add((statistics(o.dtype), B, H, num_rows(Lq, blkq))) if save else None,
        parts.add((B, H, num_q_blocks, n), torch.int32),
        parts.add((B, H, num_q_blocks, num_k_blocks), torch.int8) if choose else None,
        parts.add((B, Hkv, 1, F, D), o.dtype) if sums else None,
        parts.add((B, Hkv, F, D)) if sums else None,
        parts.add((B, Hkv, 1, F)) if sums else None,
    )


def _forward_steps(
    run, q, k, v, proj_l_weight, proj_l_bias, proj_s_weight, phi_q_weight, phi_k_weight, key_mask, block_map, o, kept,
    topk, skip, scale, blkq, blkk, feature_map, linear, keep,
):  # fmt: skip
    """Fill o and what is kept. With a plan for `run`, what is torch's own here must not be asked for."""
    o_s, lse, indices, chosen, m, h, z = kept
    keep_q, keep_k = keep[:2], keep[2:]
    fq = None if phi_q_weight is None else q @ phi_q_weight.to(q.dtype)
    fk = None if phi_k_weight is None else k @ phi_k_weight.to(k.dtype)
    norm = norm_of(k, feature_map)
    q_mean, k_mean, k_bias, sums, sums_z = prepare(
        run, q, k, v, fk, key_mask, blkq, blkk, keep_q, keep_k, feature_map, linear, block_map is None, norm
    )
    projected = (sums, sums_z, proj_l_weight, h, m, z) if linear == "all" else None
    if block_map is None:
        select(run, q_mean, k_mean, k_bias, skip, scale, q.dtype, indices, chosen, projected)
    else:
        check_chosen(block_map, topk)  # the backward writes as many entries as there are ones
        indices.copy_(indices_of(block_map, topk))
        if projected:
            project_sums(run, *projected, k.shape[1], True, 1.0)
    if linear == "marginal":
        m, z = gather_marginal(sums, sums_z, chosen if block_map is None else block_map, proj_l_weight)
    sparse_fwd(
        run, q, k, v, fq, indices, key_mask, m, z, proj_s_weight, proj_l_bias, o, o_s, lse,
        blkq, blkk, keep_q, keep_k, feature_map, scale, EPS * norm,
    )  # fmt: skip


@planned
def _forward_plan(device, q, k, v, proj_l_weight, proj_l_bias, proj_s_weight, key_mask, settings, save):
    plan = Plan(device, (q, k, v, proj_l_weight, proj_l_bias, proj_s_weight, key_mask, like(q)))
    q, k, v, proj_l_weight, proj_l_bias, proj_s_weight, key_mask, o = plan.given
    topk, _skip, _scale, blkq, blkk, feature_map, linear, keep = settings
    kept = _kept(plan.shared, o, k, topk, blkq, blkk, feature_map, linear, keep, save, True)
    weights = (proj_l_weight, proj_l_bias, proj_s_weight, None, None)
    _forward_steps(plan, q, k, v, *weights, key_mask, None, o, kept, *settings)
    plan.spare = o
    return plan


@_on_its_device
def _compute_forward(
    q, k, v, proj_l_weight, proj_l_bias, proj_s_weight, phi_q_weight, phi_k_weight, key_mask, block_map,
    topk, skip, scale, blkq, blkk, feature_map, linear, keep, save,
):  # fmt: skip
    """o, and as a tensor of bytes what is kept."""
    settings = (topk, skip, scale, blkq, blkk, feature_map, linear, keep)
    o = torch.empty_like(q)
    if block_map is None and phi_q_weight is None and linear != "marginal":
        given = (q, k, v, proj_l_weight, proj_l_bias, proj_s_weight, key_mask)
        plan = _forward_plan(q.device, *map(layout, given), settings, save)
        memory = torch.empty(plan.shared.size, dtype=torch.uint8, device=q.device)
        plan.run(*given, o, memory)
        return o, memory
    parts = Parts(q.device)
    kept = _kept(parts, o, k, topk, blkq, blkk, feature_map, linear, keep, save, block_map is None)
    memory = torch.empty(parts.size, dtype=torch.uint8, device=q.device)
    with torch.autocast(q.device.type, enabled=False):
        _forward_steps(
            Now(q.device), q, k, v, proj_l_weight, proj_l_bias, proj_s_weight, phi_q_weight, phi_k_weight, key_mask,
            block_map, o, [None if x is None else x.of(memory) for x in kept], *settings,
        )  # fmt: skip
    return o, memory


@torch.library.custom_op(add_op_namespace_prefix("forward"), mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, proj_l_weight: Optional[Tensor], proj_l_bias: Optional[Tensor],
    proj_s_weight: Optional[Tensor], phi_q_weight: Optional[Tensor], phi_k_weight: Optional[Tensor],
    key_mask: Optional[Tensor], block_map: Optional[Tensor],
    topk: float, skip: float, scale: float, blkq: int, blkk: int, feature_map: str, linear: str,
    keep: List[int], save: bool,
) -> Tuple[Tensor, Tensor]:  # fmt: skip
    return _compute_forward(
        q, k, v, proj_l_weight, proj_l_bias, proj_s_weight, phi_q_weight, phi_k_weight, key_mask, block_map,
        topk, skip, scale, blkq, blkk, feature_map, linear, tuple(keep), save,
    )  # fmt: skip


@_forward.register_fake
def _(
    q, k, v, proj_l_weight, proj_l_bias, proj_s_weight, phi_q_weight, phi_k_weight, key_mask, block_map,
    topk, skip, scale, blkq, blkk, feature_map, linear, keep, save,
):  # fmt: skip
    o, parts = torch.empty_like(q), Parts(q.device)
    _kept(parts, o, k, topk, blkq, blkk, feature_map, linear, keep, save, block_map is None)
    return o, q.new_empty(parts.size, dtype=torch.uint8)


def _backward_steps(
    run, do, q, k, v, proj_l_weight, proj_s_weight, phi_q_weight, phi_k_weight, key_mask, block_map, kept,
    gradients, topk, scale, blkq, blkk, feature_map, linear, keep,
):  # fmt: skip
    """Fill the gradients. With a plan for `run`, what is torch's own here must not be asked for."""
    o_s, lse, indices, chosen, m, h, z = kept
    dq, dk, dv, dweight, dbias, da, dphi_q, dphi_k = gradients
    block_map = chosen if block_map is None else block_map
    keep_q, keep_k = keep[:2], keep[2:]
    if linear != "none":
        norm = norm_of(k, feature_map)
        hedgehog = phi_q_weight is not None
        fq = q @ phi_q_weight.to(q.dtype) if hedgehog else q
        fk = k @ phi_k_weight.to(k.dtype) if hedgehog else k
        dfq, dfk = (torch.zeros_like(fq), torch.zeros_like(fk)) if hedgehog else (dq, dk)
        marginal, weights = linear == "marginal", None
        if marginal:
            _, _, _, sums, z = prepare(
                run, q, k, v, fk, key_mask, blkq, blkk, keep_q, keep_k, feature_map, linear, False, norm
            )
            m, z = gather_marginal(sums, z, block_map, proj_l_weight)
        dm, dz, shares = linear_bwd_q(
            run, fq, do, m, z, dfq, blkq, keep_q, feature_map, EPS * norm, marginal, key_mask
        )  # fmt: skip
        if marginal:
            del m
            dh, dz, total = scatter_marginal(dm, dz, block_map, proj_l_weight, sums, norm)
            dweight.copy_(total)
            if dbias is not None:
                dbias.copy_(shares.sum(0))
            del sums
        else:
            total, dh, dz_total = run.empty(h.shape), run.empty(m.shape, gradient_dtype(q)), run.empty(z.shape)
            project_sums(run, dm, dz, proj_l_weight, total, dh, dz_total, k.shape[1], False, norm)
            weights, dz = (total, h, shares, dweight, dbias), dz_total
        del dm
        linear_bwd_k(run, fk, v, key_mask, dh, dz, dfk, dv, blkk, keep_k, feature_map, weights)
        if hedgehog:
            image = slice(keep_q[0], q.shape[2] - keep_q[1])
            dphi_q.copy_((q[:, :, image].mT @ dfq[:, :, image]).float().sum((0, 1)))
            seen = k if key_mask is None else k.masked_fill(~key_mask[:, None, :, None], 0)
            dphi_k.copy_((seen.mT @ dfk).float().sum((0, 1)))
            dq.copy_(dfq @ phi_q_weight.to(q.dtype).t())
            dk.copy_(dfk @ phi_k_weight.to(k.dtype).t())
    do_s = do
    if proj_s_weight is not None:
        first, end = keep_q[0], q.shape[2] - keep_q[1]
        da.copy_((do[:, :, first:end].mT @ o_s[:, :, first:end]).float().sum((0, 1)))
        do_s = do @ proj_s_weight.to(q.dtype)
        do_s[:, :, :first] = do[:, :, :first]
        do_s[:, :, end:] = do[:, :, end:]
    sparse_bwd(
        run, do_s, q, k, v, o_s, lse, indices, block_map, key_mask, dq, dk, dv,
        blkq, blkk, keep_q, keep_k, scale, linear != "none",
    )  # fmt: skip


@planned
def _backward_plan(device, do, q, k, v, proj_l_weight, proj_l_bias, key_mask, block_map, settings):
    outputs = map(like, (q, k, k, proj_l_weight, proj_l_bias))
    plan = Plan(device, (do, q, k, v, proj_l_weight, key_mask, block_map, *outputs))
    do, q, k, v, proj_l_weight, key_mask, block_map, *gradients = plan.given
    topk, _scale, blkq, blkk, feature_map, linear, keep = settings
    kept = _kept(plan.shared, gradients[0], k, topk, blkq, blkk, feature_map, linear, keep, True, block_map is None)
    _backward_steps(
        plan, do, q, k, v, proj_l_weight, None, None, None, key_mask, block_map, kept,
        (*gradients, None, None, None), *settings,
    )  # fmt: skip
    return plan


@_on_its_device
def _compute_backward(
    do, q, k, v, proj_l_weight, proj_l_bias, proj_s_weight, phi_q_weight, phi_k_weight, key_mask, block_map, memory,
    topk, scale, blkq, blkk, feature_map, linear, keep,
):  # fmt: skip
    """Gradients of q, k, v and the five weights; None where there is no such weight."""
    settings = (topk, scale, blkq, blkk, feature_map, linear, keep)
    do = do.to(q.dtype)
    if do.stride(-1) != 1:
        do = do.contiguous()
    weights = (proj_l_weight, proj_l_bias, proj_s_weight, phi_q_weight, phi_k_weight)
    gradients = [None if x is None else torch.empty_like(x) for x in (q, k, k, *weights)]
    if proj_s_weight is None and phi_q_weight is None and linear != "marginal":
        layouts = map(layout, (do, q, k, v, proj_l_weight, proj_l_bias, key_mask, block_map))
        plan = _backward_plan(q.device, *layouts, settings)
        plan.run(do, q, k, v, proj_l_weight, key_mask, block_map, *gradients[:5], memory)
        return gradients
    dq, choose = gradients[0], block_map is None
    kept = _kept(Parts(q.device), dq, k, topk, blkq, blkk, feature_map, linear, keep, True, choose)
    with torch.autocast(q.device.type, enabled=False):
        _backward_steps(
            Now(q.device), do, q, k, v, proj_l_weight, proj_s_weight, phi_q_weight, phi_k_weight, key_mask, block_map,
            [None if x is None else x.of(memory) for x in kept], gradients, *settings,
        )  # fmt: skip
    return gradients


@torch.library.custom_op(add_op_namespace_prefix("backward"), mutates_args=())
def _backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, proj_l_weight: Optional[Tensor], proj_l_bias: Optional[Tensor],
    proj_s_weight: Optional[Tensor], phi_q_weight: Optional[Tensor], phi_k_weight: Optional[Tensor],
    key_mask: Optional[Tensor], block_map: Optional[Tensor], memory: Tensor,
    topk: float, scale: float, blkq: int, blkk: int, feature_map: str, linear: str, keep: List[int],
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """_compute_backward with empty tensors for None."""
    outputs = _compute_backward(
        do, q, k, v, proj_l_weight, proj_l_bias, proj_s_weight, phi_q_weight, phi_k_weight, key_mask, block_map,
        memory, topk, scale, blkq, blkk, feature_map, linear, tuple(keep),
    )  # fmt: skip
    return tuple(q.new_empty(0) if x is None else x for x in outputs)


@_backward.register_fake
def _(
    do, q, k, v, proj_l_weight, proj_l_bias, proj_s_weight, phi_q_weight, phi_k_weight, key_mask, block_map, memory,
    topk, scale, blkq, blkk, feature_map, linear, keep,
):  # fmt: skip
    weights = (proj_l_weight, proj_l_bias, proj_s_weight, phi_q_weight, phi_k_weight)
    gradients = [q.new_empty(0) if weight is None else torch.empty_like(weight) for weight in weights]
    return (torch.empty_like(q), torch.empty_like(k), torch.empty_like(k), *gradients)


def _needed(ctx, saved, gradients, rest):
    """Gradients of the forward's arguments: of the tensors that are there and want one, None for the others."""
    wanted = (x is not None and need for x, need in zip(saved, ctx.needs_input_grad))
    return (*(gradient if want else None for want, gradient in zip(wanted, gradients)), *([None] * rest))


def _setup_op_context(ctx, inputs, output):
    *tensors, topk, _skip, scale, blkq, blkk, feature_map, linear, keep, save = inputs
    ctx.saved = save
    if save:
        ctx.save_for_backward(*tensors, output[1])
        ctx.settings = (topk, scale, blkq, blkk, feature_map, linear, keep)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, do, *_):
    if not ctx.saved:
        raise RuntimeError("this call of sla_attention kept nothing for a backward")
    saved = ctx.saved_tensors  # once: checkpointing hands each tensor out a single time
    return _needed(ctx, saved[:8], _backward(do, *saved, *ctx.settings), 11)


_forward.register_autograd(_differentiate, setup_context=_setup_op_context)


class _Direct(torch.autograd.Function):
    """The two computations without the custom ops' dispatch."""

    @staticmethod
    def forward(ctx, *arguments):
        *tensors, settings = arguments
        o, memory = _compute_forward(*tensors, *settings, True)
        ctx.save_for_backward(*tensors, memory)
        ctx.settings = (settings[0], *settings[2:])
        return o

    @staticmethod
    @first_derivative_only
    def backward(ctx, saved, do):
        return _needed(ctx, saved[:8], _compute_backward(do, *saved, *ctx.settings), 3)
