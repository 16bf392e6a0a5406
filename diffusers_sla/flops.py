"""Arithmetic of attention, in floating point operations (a multiply-add counts as two)."""

from .config import SLAConfig


def dense_flops(B: int, H: int, Lq: int, Lk: int, D: int) -> int:
    """Q K^T and P V of dense attention."""
    return 4 * B * H * Lq * Lk * D


def sla_flops(
    config: SLAConfig, B: int, H: int, Lq: int, Lk: int, D: int, text_queries: int = 0, text_keys: int = 0, *,
    proj_s: bool = False,
) -> int:  # fmt: skip
    """Matrix products of `sla_attention`: choice of blocks, sparse branch, linear branch, projections.

    text_queries, text_keys: tokens that stay dense: these queries see every key, every query sees these keys.
    """
    rows, cols = Lq - text_queries, Lk - text_keys
    num_q_blocks, num_k_blocks = -(-rows // config.blkq), -(-cols // config.blkk)
    critical = min(cols, blocks_kept(config, num_k_blocks) * config.blkk)
    per_head = 2 * num_q_blocks * num_k_blocks * D  # scores of block means (eq. 2)
    per_head += 4 * text_queries * Lk * D + 4 * rows * (text_keys + critical) * D
    if config.linear != "none":
        features = 2 * D if config.feature_map == "hedgehog" else D
        per_head += 2 * (cols + rows) * features * (D + 1)  # phi(K)^T V and its row sums; phi(Q) times both
        if config.feature_map == "hedgehog":
            per_head += 2 * (cols + rows) * D * D
        if config.linear == "marginal":
            per_head += 2 * num_q_blocks * num_k_blocks * features * (D + 1)
    if proj_s:
        per_head += 2 * rows * D * D
    return B * H * per_head


def blocks_kept(config: SLAConfig, num_k_blocks: int) -> int:
    """Key blocks that each query block attends to exactly."""
    return max(1, int(config.topk * num_k_blocks))
