"""The plain torch path: same answers as the definition on any device, with memory linear in L.

The sparse branch gathers the chosen key blocks of a few query blocks at a time, so that they stay in cache, and runs
dense attention over them; its backward gathers again. The linear branch is [D, D]-sized algebra in float32.
"""

from typing import Optional

import torch
import torch.nn.functional as F

EPS = 1e-5
# Bytes of gathered keys and values per step: within the last cache, and few steps.
STEP_BYTES = 16 << 20
# Rows of one head that the linear branch takes at a time.
STEP_ROWS = 2048


def select_blocks_eager(q, k, topk, blkq, blkk, skip, scale, key_mask, keep_q, keep_k):
    """`select_blocks` in plain torch."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q_mean, _ = _block_means(_inner(q, keep_q), blkq, None)
    mask = None if key_mask is None else _inner(key_mask, keep_k, dim=1)
    k_mean, count = _block_means(_inner(k, keep_k), blkk, mask)
    k_mean = k_mean.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = (q_mean @ k_mean.mT) * scale
    if count is not None:
        scores = scores.masked_fill((count == 0)[:, None, None], float("-inf"))
    n = scores.shape[-1]
    order = scores.argsort(dim=-1, descending=True, stable=True)
    block_map = torch.zeros(scores.shape, dtype=torch.int8, device=q.device)
    block_map.scatter_(-1, order[..., n - int(skip * n) :], -1)
    return block_map.scatter_(-1, order[..., : max(1, int(topk * n))], 1)


def sla_attention_eager(
    q, k, v, *, topk, blkq, blkk, feature_map, linear, skip, scale,
    proj_l_weight, proj_l_bias, proj_s_weight, phi_q_weight, phi_k_weight,
    key_mask, keep_q, keep_k, block_map,
):  # fmt: skip
    """`sla_attention` in plain torch. All arguments as there, all required."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if block_map is None:
        with torch.no_grad():
            block_map = select_blocks_eager(q, k, topk, blkq, blkk, skip, scale, key_mask, keep_q, keep_k)
    n = max(1, int(topk * block_map.shape[-1]))
    indices = (block_map != 1).to(torch.int8).argsort(dim=-1, stable=True)[..., :n]

    with torch.autocast(q.device.type, enabled=False):
        q_inner = _inner(q, keep_q)
        o = _SparseAttention.apply(q_inner, k, v, indices, key_mask, blkq, blkk, keep_k, scale)
        if proj_s_weight is not None:
            o = o @ proj_s_weight.to(q.dtype).mT
        if linear != "none" and proj_l_weight is not None:
            marginal = block_map if linear == "marginal" else None
            k_inner, v_inner = _inner(k, keep_k), _inner(v, keep_k)
            mask = None if key_mask is None else _inner(key_mask, keep_k, dim=1)
            o = _add_linear_branch(
                o, q_inner, k_inner, v_inner, feature_map, phi_q_weight, phi_k_weight, proj_l_weight, proj_l_bias,
                mask, marginal, blkq, blkk,
            )  # fmt: skip
        if sum(keep_q):
            first, last = keep_q[0], q.shape[2] - keep_q[1]
            kept = torch.cat([q[:, :, :first], q[:, :, last:]], 2)
            kept = _dense(kept, k, v, key_mask, scale)
            o = torch.cat([kept[:, :, :first], o, kept[:, :, first:]], 2)
    out = torch.empty_like(q)  # q's order of strides
    if not o.requires_grad:
        return o if o.stride() == out.stride() else out.copy_(o)
    return o if o.stride() == out.stride() else _like(o, out)


def _like(o, out):
    order = sorted(range(4), key=out.stride, reverse=True)
    inverse = [order.index(d) for d in range(4)]
    return o.permute(order).contiguous().permute(inverse)


def _inner(x, keep, dim=2):
    return x.narrow(dim, keep[0], x.shape[dim] - sum(keep)) if sum(keep) else x


def _blocks(x, block):
    """[.., L, D] -> [.., num_blocks, block, D], the last one padded with zeros."""
    L = x.shape[-2]
    return (F.pad(x, (0, 0, 0, -L % block)) if L % block else x).unflatten(-2, (-1, block))


def _block_means(x, block, mask):
    """Float32 means [B, H, num_blocks, D], and the numbers of valid keys [B, num_blocks] where there is a mask."""
    L = x.shape[2]
    if mask is not None:
        x = x.masked_fill(~mask[:, None, :, None], 0)
        count = F.pad(mask, (0, -L % block)).unflatten(1, (-1, block)).sum(2)
        return _blocks(x, block).sum(3, dtype=torch.float32) / count.clamp(min=1)[:, None, :, None], count
    total = _blocks(x, block).sum(3, dtype=torch.float32)
    size = torch.full((total.shape[2],), block, device=x.device, dtype=torch.float32)
    size[-1] = L - (total.shape[2] - 1) * block
    return total / size[:, None], None


def _dense(q, k, v, key_mask, scale):
    mask = None if key_mask is None else key_mask[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def _phi(x, feature_map, weight):
    if feature_map == "softmax":
        return x.softmax(-1)
    if feature_map == "elu":
        return F.elu(x) + 1
    if feature_map == "relu":
        return x.relu()
    x = x @ weight.float()
    return torch.cat([x, -x], -1).softmax(-1)


def _add_linear_branch(
    o, q, k, v, feature_map, phi_q, phi_k, weight, bias, key_mask, block_map, blkq, blkk,
):  # fmt: skip
    """o + O_l W^T + b (eq. 5, 6), the branch in float32: phi(q) (H W^T) / (phi(q) z + eps), H and z over all or the
    marginal blocks. Where no gradient is wanted it is added in place.

    A CPU takes one key head at a time, whose pieces stay in its caches; other devices take all of them at once.
    """
    Hkv = k.shape[1]
    q, o_heads = (x.unflatten(1, (Hkv, -1)) for x in (q, o))  # [B, Hkv, group, L, D]
    rows = None if block_map is None else (block_map == 0).unflatten(1, (Hkv, -1))
    mask = None if key_mask is None else key_mask[:, None].expand(*k.shape[:3])
    heads = [(...,)] if q.device.type != "cpu" else [(b, h) for b in range(k.shape[0]) for h in range(Hkv)]
    weight = weight.float()
    bias = torch.zeros(weight.shape[0], device=q.device) if bias is None else bias.float()
    tracked = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (o, q, k, v, phi_q, phi_k, weight, bias)
    )
    parts = []
    for head in heads:
        hidden = None if mask is None else ~mask[head]
        arguments = (q[head], k[head], v[head], hidden, feature_map, phi_q, phi_k, weight, bias)
        pieces = _all_blocks(*arguments) if rows is None else _marginal_blocks(*arguments, rows[head], blkq, blkk)
        if tracked:
            parts.append(torch.cat([numerator / denominator for _, numerator, denominator in pieces], -2))
            continue
        for at, numerator, denominator in pieces:
            target = o_heads[head][..., at, :]
            if target.dtype == numerator.dtype:
                target.addcdiv_(numerator, denominator)
            else:
                target.copy_(numerator.div_(denominator).add_(target))
    if not tracked:
        return o
    branch = (torch.stack(parts) if len(parts) > 1 else parts[0]).view(q.shape).flatten(1, 2)
    return (o.float() + branch).to(o.dtype)


def _steps(length):
    return (slice(start, min(start + STEP_ROWS, length)) for start in range(0, length, STEP_ROWS))


def _all_blocks(q, k, v, hidden, feature_map, phi_q, phi_k, weight, bias):
    """(rows, numerator, denominator) of O_l W^T + b for those rows of q [.., group, Lq, D]; one H for all blocks.

    k, v: [.., Lk, D]. hidden: [.., Lk].
    """
    h = z = torch.zeros((), device=q.device)
    for at in _steps(k.shape[-2]):
        f, values = _phi(k[..., at, :].float(), feature_map, phi_k), v[..., at, :].float()
        if hidden is not None:
            f, values = (x.masked_fill(hidden[..., at, None], 0) for x in (f, values))
        h, z = h + f.mT @ values, z + f.sum(-2)
    m, eps = _quotient(h @ weight.mT, z, bias)
    for at in _steps(q.shape[-2]):
        f = _phi(q[..., at, :].float(), feature_map, phi_q)
        yield at, *_split(f @ m.unsqueeze(-3) + eps)


def _marginal_blocks(q, k, v, hidden, feature_map, phi_q, phi_k, weight, bias, rows, blkq, blkk):
    """As `_all_blocks`, with an H for each query block: the sum over its marginal blocks, rows [.., group, Nq, Nk]."""
    f, v = _phi(k.float(), feature_map, phi_k), v.float()
    if hidden is not None:
        f, v = (x.masked_fill(hidden[..., None], 0) for x in (f, v))
    f, v = _blocks(f, blkk), _blocks(v, blkk)
    sums, z = ((f.mT @ v) @ weight.mT).unsqueeze(-4), f.sum(-2).unsqueeze(-3)  # [.., 1, Nk, F, D], [.., 1, Nk, F]
    rows = rows.float()
    m, eps = _quotient((rows @ sums.flatten(-2)).unflatten(-1, sums.shape[-2:]), rows @ z, bias)
    f = _blocks(_phi(q.float(), feature_map, phi_q), blkq)
    numerator, denominator = _split((f @ m + eps).flatten(-3, -2)[..., : q.shape[-2], :])
    yield slice(0, q.shape[-2]), numerator, denominator


def _quotient(m, z, bias):
    """([.., F, D + 1], [D + 1]): phi(q) times the one plus the other is (phi(q) m + bias times the denominator) beside
    the denominator phi(q) z + eps, so that one product makes all of the branch."""
    m = torch.cat([m + z[..., None] * bias, z[..., None]], -1)
    return m, EPS * torch.cat([bias, torch.ones_like(bias[:1])])


def _split(product):
    return product[..., :-1], product[..., -1:]


class _SparseAttention(torch.autograd.Function):
    """Softmax attention of each query block over its listed key blocks and the kept keys.

    Saves its inputs only; the backward gathers and computes again.
    """

    @staticmethod
    def forward(ctx, q, k, v, indices, key_mask, blkq, blkk, keep_k, scale):
        ctx.save_for_backward(q, k, v, indices, key_mask)
        ctx.settings = (blkq, blkk, keep_k, scale)
        gather = _Gather(q, k, v, indices, key_mask, blkq, blkk, keep_k)
        out = torch.empty(gather.q.shape, dtype=q.dtype, device=q.device)
        for rows in gather.steps():
            q_rows, keys, values, visible, _ = gather(rows)
            out[rows] = _attend(q_rows, keys, values, visible, scale)
        return gather.join(out)

    @staticmethod
    def backward(ctx, do):
        q, k, v, indices, key_mask = ctx.saved_tensors
        blkq, blkk, keep_k, scale = ctx.settings
        gather = _Gather(q, k, v, indices, key_mask, blkq, blkk, keep_k)
        do = _blocks(do, blkq).reshape(gather.q.shape)
        dq = torch.empty_like(gather.q)
        dk = torch.zeros(gather.k.shape, dtype=torch.float32, device=q.device)
        dv = torch.zeros_like(dk)
        dk_kept = torch.zeros(gather.kept_k.shape, dtype=torch.float32, device=q.device)
        dv_kept = torch.zeros_like(dk_kept)
        E = dk_kept.shape[1]
        for rows in gather.steps():
            q_rows, keys, values, visible, (at, head) = gather(rows)
            p = _probabilities(q_rows, keys, visible, scale)
            do_rows = do[rows]
            dp = (do_rows @ values.mT).float()
            ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
            ds, p = ds.to(q.dtype), p.to(q.dtype)
            dq[rows] = ds @ keys
            for gradient, gradient_kept, product in ((dk, dk_kept, ds.mT @ q_rows), (dv, dv_kept, p.mT @ do_rows)):
                product = product.float()
                gradient_kept.index_add_(0, head, product[:, :E])
                gradient.index_add_(0, at.flatten(), product[:, E:].reshape(-1, *gradient.shape[1:]))
        return (
            gather.join(dq), gather.join_keys(dk, dk_kept, k), gather.join_keys(dv, dv_kept, v),
            *([None] * 6),
        )  # fmt: skip


def _probabilities(q, k, visible, scale):
    """Softmax over the visible keys in float32, 0 in rows without one."""
    scores = (q @ k.mT).float() * scale
    if visible is None:
        return scores.softmax(-1)
    scores = scores.masked_fill(~visible[:, None], float("-inf"))
    return scores.softmax(-1).masked_fill(~visible.any(-1)[:, None, None], 0)


def _attend(q, k, v, visible, scale):
    if visible is None:
        return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], scale=scale)[:, 0]
    p = _probabilities(q, k, visible, scale)
    return p.to(v.dtype) @ v


class _Gather:
    """Query blocks [B * H * num_q_blocks, blkq, D] and, for any few of them, their keys and values side by side."""

    def __init__(self, q, k, v, indices, key_mask, blkq, blkk, keep_k):
        self.shape = q.shape
        self.keep_k = keep_k
        B, H, _, D = q.shape
        Hkv, Lk = k.shape[1:3]
        first, last = keep_k[0], Lk - keep_k[1]
        self.q = _blocks(q, blkq).reshape(-1, blkq, D)
        self.k = _blocks(k[:, :, first:last], blkk).reshape(-1, blkk, D)
        self.v = _blocks(v[:, :, first:last], blkk).reshape(-1, blkk, D)
        self.kept_k, self.kept_v = (torch.cat([x[:, :, :first], x[:, :, last:]], 2).flatten(0, 1) for x in (k, v))
        num_q_blocks, self.n = indices.shape[2:]
        num_k_blocks = -(-(last - first) // blkk)
        head = torch.arange(B * Hkv, device=q.device).view(B, Hkv, 1, 1).expand(B, Hkv, H // Hkv, num_q_blocks)
        self.head = head.reshape(-1)
        self.at = self.head[:, None] * num_k_blocks + indices.reshape(-1, self.n)
        per_block = 2 * (self.n * blkk + self.kept_k.shape[1]) * D * k.element_size()
        self.size = max(4, STEP_BYTES // per_block)
        # Fresh memory for every step would cost as much as the copy into it.
        self.room = k.new_empty((2, min(self.size, self.q.shape[0]) * self.n, blkk, D))
        self.valid: Optional[torch.Tensor] = None
        self.kept_valid: Optional[torch.Tensor] = None
        if key_mask is not None or (last - first) % blkk:
            valid = torch.ones(B, Lk, dtype=torch.bool, device=q.device) if key_mask is None else key_mask
            inner = F.pad(valid[:, first:last], (0, -(last - first) % blkk)).view(B, 1, num_k_blocks, blkk)
            self.valid = inner.expand(B, Hkv, num_k_blocks, blkk).reshape(-1, blkk)
            kept = torch.cat([valid[:, :first], valid[:, last:]], 1)
            self.kept_valid = kept[:, None].expand(B, Hkv, kept.shape[1]).flatten(0, 1)
        if (
            key_mask is not None and self.valid is not None and self.kept_valid is not None
        ):  # what a mask hides must not reach anyone, NaN included
            self.k, self.v = (x.masked_fill(~self.valid[..., None], 0) for x in (self.k, self.v))
            hidden = ~self.kept_valid[..., None]
            self.kept_k, self.kept_v = (x.masked_fill(hidden, 0) for x in (self.kept_k, self.kept_v))

    def steps(self):
        for start in range(0, self.q.shape[0], self.size):
            yield slice(start, start + self.size)

    def __call__(self, rows):
        """What the next step attends to; the keys and values are overwritten by the call after it."""
        at, head = self.at[rows], self.head[rows]
        keys, values = (
            torch.index_select(x, 0, at.flatten(), out=room[: at.numel()]).view(at.shape[0], -1, x.shape[2])
            for x, room in ((self.k, self.room[0]), (self.v, self.room[1]))
        )
        visible = None if self.valid is None else self.valid[at].flatten(1)
        if self.kept_k.shape[1]:
            keys = torch.cat([self.kept_k[head], keys], 1)
            values = torch.cat([self.kept_v[head], values], 1)
            if visible is not None and self.kept_valid is not None:
                visible = torch.cat([self.kept_valid[head], visible], 1)
        return self.q[rows], keys, values, visible, (at, head)

    def join(self, blocks):
        """[B * H * num_q_blocks, blkq, D] -> [B, H, Lq, D]."""
        B, H, Lq, D = self.shape
        return blocks.view(B, H, -1, D)[:, :, :Lq]

    def join_keys(self, blocks, kept, like):
        """Gradients of key blocks and kept keys -> [B, Hkv, Lk, D] in the dtype of `like`."""
        B, Hkv, Lk, D = like.shape
        first, last = self.keep_k[0], Lk - self.keep_k[1]
        out = torch.empty_like(like)
        out[:, :, first:last] = blocks.view(B, Hkv, -1, D)[:, :, : last - first]
        kept = kept.view(B, Hkv, -1, D)
        out[:, :, :first], out[:, :, last:] = kept[:, :, :first], kept[:, :, first:]
        return out
