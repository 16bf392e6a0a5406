"""The plain torch path: same answers as the definition on any device, with memory linear in L.

The sparse branch gathers the chosen key blocks of a few query blocks at a time, so that they stay in cache, and runs
dense attention over them; its backward gathers again. The linear branch is [D, D]-sized algebra in float32.
"""

import itertools
from typing import Optional

import torch
import torch.nn.functional as F

from .derivatives import first_derivative_only

EPS = 1e-5
SOFTMAX_MAPS = ("softmax", "hedgehog")
# Bytes of gathered keys, values and scores, or of one piece of phi(q) or phi(k): in cache, also of a busy machine.
STEP_BYTES = 4 << 20
FAST_BF16 = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()  # here, as Dynamo does not trace it


def select_blocks_eager(q, k, topk, blkq, blkk, skip, scale, key_mask, keep_q, keep_k):
    """`select_blocks` in plain torch."""
    with torch.autocast(q.device.type, enabled=False):
        q, k = _as_computed(q, k)
        return _choose(_scores(q, k, blkq, blkk, scale, key_mask, keep_q, keep_k), topk, skip, True)[1]


def _as_computed(*tensors):
    """Contiguous, and in float32 where products in half precision take longer: on a CPU without such products."""
    dtype = tensors[0].dtype
    if tensors[0].device.type == "cpu" and not (dtype is torch.bfloat16 and FAST_BF16):
        dtype = torch.float32
    return tuple(x.to(dtype, memory_format=torch.contiguous_format).contiguous() for x in tensors)


def _scores(q, k, blkq, blkk, scale, key_mask, keep_q, keep_k):
    """What ranks the key blocks of each query block: [B, H, num_q_blocks, num_k_blocks] float32."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    # Factors that all scores of a row share do not change its order, so sums do for means where all blocks are whole.
    q_sum = _blocks(_inner(q, keep_q), blkq).sum(3, dtype=torch.float32)
    k = _inner(k, keep_k)
    mask = None if key_mask is None else _inner(key_mask, keep_k, dim=1)
    if mask is not None:
        k = k.masked_fill(~mask[:, None, :, None], 0)
    elif k.shape[2] % blkk:
        mask = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool, device=k.device)
    k_mean = _blocks(k, blkk).sum(3, dtype=torch.float32)
    if mask is not None:
        count = F.pad(mask, (0, -mask.shape[1] % blkk)).unflatten(1, (-1, blkk)).sum(2)[:, None]
        k_mean /= count.clamp(min=1)[..., None]
    if q.shape[1] != k.shape[1]:
        k_mean = k_mean.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = (q_sum @ k_mean.mT).mul_(scale)
    if mask is not None:
        scores.masked_fill_((count == 0)[:, :, None], float("-inf"))
    return scores


def _choose(scores, topk, skip, mapped):
    """Indices [.., n] int64 of the critical blocks, best first, and if `mapped` the int8 map of eq. 3, else None."""
    num_k_blocks, n = scores.shape[-1], max(1, int(topk * scores.shape[-1]))
    if n == 1 and not mapped:  # the first of equals, as with a stable sort, in a tenth of its time
        return scores.argmax(-1, keepdim=True), None
    ranking = scores.argsort(dim=-1, descending=True, stable=True)
    indices = ranking[..., :n]
    if not mapped:
        return indices, None
    block_map = torch.zeros(ranking.shape, dtype=torch.int8, device=ranking.device)
    block_map.scatter_(-1, ranking[..., num_k_blocks - int(skip * num_k_blocks) :], -1)
    return indices, block_map.scatter_(-1, indices, 1)


def sla_attention_eager(
    q, k, v, *, topk, blkq, blkk, feature_map, linear, skip, scale,
    proj_l_weight, proj_l_bias, proj_s_weight, phi_q_weight, phi_k_weight,
    key_mask, keep_q, keep_k, block_map,
):  # fmt: skip
    """`sla_attention` in plain torch. All arguments as there, all required."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    given = q
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = _as_computed(q, k, v)
        if key_mask is not None:  # what it hides must not reach anyone, NaN included
            k, v = (x.masked_fill(~key_mask[:, None, :, None], 0) for x in (k, v))
        if block_map is None:
            with torch.no_grad():
                scores = _scores(q, k, blkq, blkk, scale, key_mask, keep_q, keep_k)
            indices, block_map = _choose(scores, topk, skip, linear == "marginal")
        else:
            indices = _choose((block_map == 1).to(torch.int8), topk, skip, False)[0]

        q_inner = _inner(q, keep_q)
        o = _SparseAttention.apply(q_inner, k, v, indices, key_mask, blkq, blkk, keep_k, scale)
        if proj_s_weight is not None:
            o = o @ proj_s_weight.to(q.dtype).mT
        if linear != "none" and proj_l_weight is not None:
            marginal = block_map if linear == "marginal" else None
            k_inner, v_inner = _inner(k, keep_k), _inner(v, keep_k)
            mask = None if key_mask is None else _inner(key_mask, keep_k, dim=1)
            o = _add_linear_branch(
                o, q_inner, k_inner, v_inner, feature_map, phi_q_weight, phi_k_weight,
                proj_l_weight, proj_l_bias, mask, marginal, blkq, blkk,
            )  # fmt: skip
        if sum(keep_q):
            first, last = keep_q[0], q.shape[2] - keep_q[1]
            kept = torch.cat([q[:, :, :first], q[:, :, last:]], 2)
            kept = _dense(kept, k, v, key_mask, scale)
            o = torch.cat([kept[:, :, :first], o, kept[:, :, first:]], 2)
    if o.dtype == given.dtype and o.stride() == given.stride():
        return o
    out = torch.empty_like(given)  # q's order of strides
    return _like(o.to(out.dtype), out) if o.requires_grad else out.copy_(o)


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


def _dense(q, k, v, key_mask, scale):
    mask = None if key_mask is None else key_mask[:, None, None, :]
    gqa = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}  # a traced length's comparison is no bool
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, **gqa)


def _add_linear_branch(
    o, q, k, v, feature_map, phi_q, phi_k, weight, bias, key_mask, block_map, blkq, blkk,
):  # fmt: skip
    """o + O_l W^T + b (eq. 5, 6), summed in float32; in place where no gradient is wanted, else float32.

    Key heads go together, as one call of many products keeps all cores busy, but one by one where every query block
    has sums of its own.
    """
    (B, Hkv), L = k.shape[:2], q.shape[2]
    q, targets = (x.view(B, Hkv, -1, *x.shape[2:]) for x in (q, o))  # [B, Hkv, group, L, D]
    rows = None if block_map is None else (block_map == 0).unflatten(1, (Hkv, -1))
    slices = [slice(None)] if rows is None else [slice(h, h + 1) for h in range(Hkv)]
    weight = weight.float()
    tracked = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (o, q, k, v, phi_q, phi_k, weight, bias)
    )
    # Rows of f that sum to 1 carry b through m, but then the gradient of f is not exactly 0 where nothing is summed.
    carried = None if tracked or feature_map not in SOFTMAX_MAPS else bias
    results = []
    for b, heads in itertools.product(range(B), slices):
        hidden = None if key_mask is None else ~key_mask[b, :, None]
        keys = (k[b, heads], v[b, heads], hidden, feature_map, phi_k, weight)
        h, z = _key_sums(*keys) if rows is None else _block_sums(*keys, blkk)
        for g in range(q.shape[2]):
            queries, target = (q[b, heads, g], feature_map, phi_q, carried), targets[b, heads, g]
            if rows is None:
                pieces = _all_blocks(*queries, h, z)
            else:
                pieces = _marginal_blocks(*queries, h, z, rows[b, heads, g], blkq)
            if tracked:
                results.append(target + torch.cat([(f @ m).flatten(1, -2)[:, :L] for _, f, m in pieces], 1))
                continue
            for at, f, m in pieces:
                piece = target[:, at].float()
                if rows is None:
                    piece.baddbmm_(f, m)
                else:
                    piece += (f @ m).flatten(1, -2)[:, :L]
                if bias is not carried:
                    piece += bias.float()
                if target.dtype != piece.dtype:
                    target[:, at] = piece
    if tracked:
        slices_first = torch.stack(results).view(B, len(slices), q.shape[2], -1, *o.shape[2:])
        o = slices_first.transpose(2, 3).reshape(o.shape)
    return o if bias is carried or not tracked else o + bias.float()


def _all_blocks(q, feature_map, phi_q, bias, h, z):
    """Pieces (rows, f, m) of q [Hkv, Lq, D] whose products f m are O_l W^T, from h [Hkv, F, D] and z [Hkv, F]."""
    m, z = _mixture(h, z, feature_map, bias)
    for at in _steps(q):
        yield at, _weights(q[:, at], z, feature_map, phi_q), m


def _marginal_blocks(q, feature_map, phi_q, bias, h, z, rows, blkq):
    """As `_all_blocks`, f and m by query blocks: of its marginal blocks, rows [Hkv, Nq, Nk]. h: [Hkv, Nk, F, D]."""
    rows = rows.float()
    m, z = _mixture((rows @ h.flatten(2)).unflatten(2, h.shape[2:]), rows @ z, feature_map, bias)
    yield slice(None), _weights(_blocks(q, blkq), z, feature_map, phi_q), m


def _key_sums(k, v, hidden, feature_map, phi_k, weight):
    """H W^T [Hkv, F, D] and z [Hkv, F] of k, v [Hkv, Lk, D]. hidden: [Lk, 1]."""
    h = z = None
    for at in _steps(k):
        f, values = _key_features(k[:, at], v[:, at], None if hidden is None else hidden[at], feature_map, phi_k)
        h_piece, z_piece = f.mT @ values, f.sum(-2)
        h, z = (h_piece, z_piece) if h is None else (h + h_piece, z + z_piece)
    return h @ weight.mT, z


def _block_sums(k, v, hidden, feature_map, phi_k, weight, blkk):
    """`_key_sums` of each key block: [Hkv, Nk, F, D] and [Hkv, Nk, F]."""
    f, v = (_blocks(x, blkk) for x in _key_features(k, v, hidden, feature_map, phi_k))
    return (f.mT @ v) @ weight.mT, f.sum(-2)


def _key_features(k, v, hidden, feature_map, phi_k):
    f, v = _logits(k, feature_map, phi_k), v.float()
    if feature_map in SOFTMAX_MAPS:
        f = _softmax(f, f is not k)
    return (f if hidden is None else f.masked_fill(hidden, 0)), v


def _mixture(h, z, feature_map, bias):
    """phi(q) (H W^T) / (phi(q) z + eps) [+ b] as a product f m: m, and what f needs of z.

    A phi that is a softmax sums to 1, so the denominator is phi(q) (z + eps), and f a softmax with z in its logits:
    softmax(logits + log(z + eps)) times H W^T / (z + eps). That leaves nothing of a query's to divide.
    """
    z = z[..., None]
    if feature_map not in SOFTMAX_MAPS:
        return h, z
    m = h / (z + EPS)
    return m if bias is None else m + bias.float(), (z + EPS).log().mT


def _weights(q, z, feature_map, phi_q):
    """f [.., rows, F], z as `_mixture` returns it."""
    f = _logits(q, feature_map, phi_q)
    if feature_map not in SOFTMAX_MAPS:
        return f / (f @ z + EPS)
    return _softmax(f + z if f is q else f.add_(z), True)


def _softmax(x, own):
    """Of the last dimension; in place where x is our `own` and no gradient passes it."""
    return torch.softmax(x, -1, out=x) if own and not x.requires_grad else x.softmax(-1)


def _logits(x, feature_map, weight):
    """The feature map in float32, of those that end in a softmax what it is taken of."""
    x = x.float()
    if feature_map == "softmax":
        return x
    if feature_map == "elu":
        return F.elu(x) + 1
    if feature_map == "relu":
        return x.relu()
    x = x @ weight.float()
    return torch.cat([x, -x], -1)


def _steps(x):
    """Slices of the rows of x [Hkv, L, D], whose float32 copies stay in cache."""
    rows = _even(x.shape[1], STEP_BYTES // (4 * x.shape[0] * x.shape[2]))
    return (slice(start, start + rows) for start in range(0, x.shape[1], rows))


def _even(total, most):
    """Size of each step of equal ones, up to `most` of `total` a step."""
    return -(-total // -(-total // max(1, most)))


class _SparseAttention(torch.autograd.Function):
    """Softmax attention of query blocks over their listed key blocks and the kept keys. The backward gathers anew."""

    @staticmethod
    def forward(ctx, q, k, v, indices, key_mask, blkq, blkk, keep_k, scale):
        ctx.save_for_backward(q, k, v, indices, key_mask)
        ctx.settings = (blkq, blkk, keep_k, scale)
        gather = _Gather(q, k, v, indices, key_mask, blkq, blkk, keep_k)
        out = torch.empty(gather.q.shape, dtype=q.dtype, device=q.device)
        for rows in gather.steps():
            q_rows, keys, values, visible = gather(rows)
            p = _probabilities(q_rows, keys, visible, scale, gather.scores[: q_rows.shape[0]])
            torch.bmm(p.to(q.dtype), values, out=out[rows])
        return gather.join(out)

    @staticmethod
    @first_derivative_only
    def backward(ctx, saved, do):
        q, k, v, indices, key_mask = saved
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
            q_rows, keys, values, visible = gather(rows)
            p = _probabilities(q_rows, keys, visible, scale)
            do_rows = do[rows]
            dp = (do_rows @ values.mT).float()
            ds = p * (dp - (p * dp).sum(-1, keepdim=True)) * scale
            ds, p = ds.to(q.dtype), p.to(q.dtype)
            dq[rows] = ds @ keys
            for gradient, gradient_kept, product in ((dk, dk_kept, ds.mT @ q_rows), (dv, dv_kept, p.mT @ do_rows)):
                product = product.float()
                gradient.index_add_(0, gather.at[rows].view(-1), product[:, E:].reshape(-1, *gradient.shape[1:]))
                gradient_kept.index_add_(0, gather.head(rows), product[:, :E])
        return (
            gather.join(dq), gather.join_keys(dk, dk_kept, k), gather.join_keys(dv, dv_kept, v),
            *([None] * 6),
        )  # fmt: skip


def _probabilities(q, k, visible, scale, out=None):
    """Softmax over the visible keys in float32, 0 in rows without one. out: room for the scores, in q's dtype."""
    scores = torch.baddbmm(q.new_empty(()), q, k.mT, beta=0, alpha=scale, out=out).float()
    if visible is None:
        return torch.softmax(scores, -1, out=scores)
    scores.masked_fill_(~visible[:, None], float("-inf"))
    return torch.softmax(scores, -1, out=scores).masked_fill_(~visible.any(-1)[:, None, None], 0)


class _Gather:
    """Query blocks [B * H * num_q_blocks, blkq, D] and, for any few of them, their keys and values side by side."""

    def __init__(self, q, k, v, indices, key_mask, blkq, blkk, keep_k):
        self.shape = q.shape
        self.keep_k = keep_k
        D = q.shape[3]
        B, Hkv, Lk, _ = k.shape
        first, last = keep_k[0], Lk - keep_k[1]
        self.q = _blocks(q, blkq).reshape(-1, blkq, D)
        self.k = _blocks(k[:, :, first:last], blkk).reshape(-1, blkk, D)
        self.v = _blocks(v[:, :, first:last], blkk).reshape(-1, blkk, D)
        self.num_k_blocks = num_k_blocks = -(-(last - first) // blkk)
        starts = torch.arange(0, self.k.shape[0], num_k_blocks, device=q.device)
        self.at = (indices.reshape(B * Hkv, -1) + starts[:, None]).view(-1, indices.shape[3])
        self.kept_k, self.kept_v = (torch.cat([x[:, :, :first], x[:, :, last:]], 2).flatten(0, 1) for x in (k, v))
        E = self.kept_k.shape[1]
        listed = self.at.shape[1] * blkk
        sizes = (listed * D, listed * D, blkq * (E + listed))
        self.size = _even(self.at.shape[0], STEP_BYTES // (sum(sizes) * k.element_size()))
        # One piece of memory for all steps, never a small one: fresh pages would cost more than what is written into
        # them, and malloc gives a piece back to the system once more than twice the largest is free.
        room = k.new_empty(max(self.size * sum(sizes), 2 * STEP_BYTES // k.element_size()))
        room = room[: self.size * sum(sizes)].split([self.size * n for n in sizes])
        self.room = [x.view(-1, blkk, D) for x in room[:2]]
        self.scores = room[2].view(-1, blkq, E + listed)
        self.valid: Optional[torch.Tensor] = None
        self.kept_valid: Optional[torch.Tensor] = None
        if key_mask is not None or (last - first) % blkk:
            valid = torch.ones(B, Lk, dtype=torch.bool, device=q.device) if key_mask is None else key_mask
            inner = F.pad(valid[:, first:last], (0, -(last - first) % blkk)).view(B, 1, num_k_blocks, blkk)
            self.valid = inner.expand(B, Hkv, num_k_blocks, blkk).reshape(-1, blkk)
            kept = torch.cat([valid[:, :first], valid[:, last:]], 1)
            self.kept_valid = kept[:, None].expand(B, Hkv, kept.shape[1]).flatten(0, 1)

    def steps(self):
        for start in range(0, self.q.shape[0], self.size):
            yield slice(start, start + self.size)

    def __call__(self, rows):
        """What the next step attends to; the keys and values are overwritten by the call after it."""
        at = self.at[rows]
        keys, values = (
            torch.index_select(x, 0, at.view(-1), out=room[: at.numel()]).view(at.shape[0], -1, x.shape[2])
            for x, room in ((self.k, self.room[0]), (self.v, self.room[1]))
        )
        visible = None if self.valid is None else self.valid[at].flatten(1)
        if self.kept_k.shape[1]:
            head = self.head(rows)
            keys = torch.cat([self.kept_k[head], keys], 1)
            values = torch.cat([self.kept_v[head], values], 1)
            if visible is not None and self.kept_valid is not None:
                visible = torch.cat([self.kept_valid[head], visible], 1)
        return self.q[rows], keys, values, visible

    def head(self, rows):
        """Of B * Hkv, whose keys those query blocks read."""
        return self.at[rows, 0] // self.num_k_blocks

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
