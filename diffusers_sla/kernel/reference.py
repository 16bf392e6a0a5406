"""The definition: sparse-linear attention in dense torch. Quadratic memory, any dtype; imports no sibling."""

import torch


def block_bounds(length, block, keep):
    """Start and end of each block of a sequence: [n, 2] int64. `keep` = (first, last) tokens belong to no block."""
    first, last = keep
    starts = torch.arange(first, length - last, block)
    return torch.stack([starts, (starts + block).clamp(max=length - last)], 1)


def block_scores_reference(q, k, blkq, blkk, scale=None, key_mask=None, keep_q=(0, 0), keep_k=(0, 0)):
    """Mean query . mean key of each pair of blocks (eq. 2 without its softmax, which cannot change a ranking).

    Returns [B, H, num_q_blocks, num_k_blocks]; a block without a valid key scores -inf.
    """
    B, H, Lq, D = q.shape
    Hkv, Lk = k.shape[1], k.shape[2]
    scale = D**-0.5 if scale is None else scale
    valid = torch.ones(B, Lk, dtype=torch.bool, device=q.device) if key_mask is None else key_mask
    q_mean = torch.stack([q[:, :, s:e].mean(2) for s, e in block_bounds(Lq, blkq, keep_q).tolist()], 2)
    means, empty = [], []
    for start, end in block_bounds(Lk, blkk, keep_k).tolist():
        here = valid[:, start:end]
        count = here.sum(1)
        total = k[:, :, start:end].masked_fill(~here[:, None, :, None], 0.0).sum(2)
        means.append(total / count.clamp(min=1)[:, None, None])
        empty.append(count == 0)
    k_mean = torch.stack(means, 2).repeat_interleave(H // Hkv, 1)
    scores = (q_mean @ k_mean.mT) * scale
    return scores.masked_fill(torch.stack(empty, 1)[:, None, None], float("-inf"))


def block_map_reference(scores, topk, skip):
    """int8 map of eq. 3 from block scores: 1 critical, 0 marginal, -1 negligible. Ties go to the lower index."""
    n = scores.shape[-1]
    order = scores.argsort(dim=-1, descending=True, stable=True)
    ranks = torch.empty_like(order).scatter_(-1, order, torch.arange(n, device=order.device).expand_as(order))
    block_map = torch.zeros_like(scores, dtype=torch.int8)
    block_map[ranks >= n - int(skip * n)] = -1
    block_map[ranks < max(1, int(topk * n))] = 1
    return block_map


def check_chosen(block_map, topk):
    """Raise where a row of a given map has not as many ones as topk says; from a GPU later, as an assertion there."""
    n = max(1, int(topk * block_map.shape[-1]))
    counts = (block_map == 1).sum(-1)
    if block_map.is_cuda:  # no wait for it
        torch._assert_async((counts == n).all(), f"block_map must have {n} ones in every row")
    elif bool((counts != n).any()):
        found = f"{int(counts.min())} to {int(counts.max())}"
        raise ValueError(f"block_map must have {n} ones in every row, as topk is {topk}, got {found}")


def phi(x, feature_map, weight=None):
    """Feature map of the linear branch: [..., D] -> [..., D], or [..., 2 D] for "hedgehog" with weight M [D, D]."""
    if feature_map == "softmax":
        return x.softmax(-1)
    if feature_map == "elu":
        return torch.nn.functional.elu(x) + 1
    if feature_map == "relu":
        return x.relu()
    projected = x @ weight.to(x.dtype)
    return torch.cat([projected, -projected], -1).softmax(-1)


def sla_attention_reference(
    q, k, v, *, topk, blkq, blkk, feature_map, linear, skip, scale,
    proj_l_weight, proj_l_bias, proj_s_weight, phi_q_weight, phi_k_weight,
    key_mask, keep_q, keep_k, block_map,
):  # fmt: skip
    """`sla_attention` over explicit [B, H, Lq, Lk] masks. All arguments as there, all required."""
    B, H, Lq, D = q.shape
    Hkv, Lk = k.shape[1], k.shape[2]
    scale = D**-0.5 if scale is None else scale
    if block_map is None:
        with torch.no_grad():
            scores = block_scores_reference(q, k, blkq, blkk, scale, key_mask, keep_q, keep_k)
            block_map = block_map_reference(scores, topk, skip)
    k, v = k.repeat_interleave(H // Hkv, 1), v.repeat_interleave(H // Hkv, 1)

    valid = torch.ones(B, Lk, dtype=torch.bool, device=q.device) if key_mask is None else key_mask
    k, v = (x.masked_fill(~valid[:, None, :, None], 0.0) for x in (k, v))  # 0 times what is hidden may be NaN
    valid = valid[:, None, None, :]
    kept_query = torch.ones(Lq, dtype=torch.bool, device=q.device)
    kept_query[keep_q[0] : Lq - keep_q[1]] = False
    kept_key = torch.ones(Lk, dtype=torch.bool, device=q.device)
    kept_key[keep_k[0] : Lk - keep_k[1]] = False

    token_map = torch.zeros(B, H, Lq, Lk, dtype=torch.int8, device=q.device)
    inner = block_map.repeat_interleave(blkq, 2).repeat_interleave(blkk, 3)
    rows, cols = Lq - sum(keep_q), Lk - sum(keep_k)
    token_map[:, :, keep_q[0] : Lq - keep_q[1], keep_k[0] : Lk - keep_k[1]] = inner[:, :, :rows, :cols]

    exact = ((token_map == 1) | kept_key | kept_query[:, None]) & valid
    scores = (q @ k.mT * scale).masked_fill(~exact, float("-inf"))
    # A row without a key gives 0; NaN in q or k stays NaN, because only -inf is replaced.
    peak = scores.amax(-1, keepdim=True)
    p = (scores - torch.where(peak == float("-inf"), 0.0, peak)).exp()
    total = p.sum(-1, keepdim=True)
    o_s = (p / torch.where(total == 0, 1.0, total)) @ v

    approximate = ~kept_query[:, None]
    o = o_s if proj_s_weight is None else torch.where(approximate, o_s @ proj_s_weight.to(q.dtype).mT, o_s)
    if linear == "none" or proj_l_weight is None:
        return o
    summed = (token_map == 0) if linear == "marginal" else torch.ones_like(exact)
    summed = summed & ~kept_key & valid
    features_q, features_k = phi(q, feature_map, phi_q_weight), phi(k, feature_map, phi_k_weight)
    weights = (features_q @ features_k.mT).masked_fill(~summed, 0.0)
    total = weights.sum(-1, keepdim=True)
    # 0 / 1 where nothing is summed: 1 / 1e-5 would overflow float16 in the gradients.
    o_l = (weights @ v) / torch.where(total == 0, 1.0, total + 1e-5)
    o_l = o_l @ proj_l_weight.to(q.dtype).mT
    if proj_l_bias is not None:
        o_l = o_l + proj_l_bias.to(q.dtype)
    return torch.where(approximate, o + o_l, o)
