"""What torch does for linear="marginal": the sums over the marginal blocks of each query block, as products of the 0/1
map with the sums per key block. No sum is subtracted from that over all blocks, so nothing cancels; the backward is
the transpose.
"""


def marginal_rows(block_map, num_kv_heads, dtype):
    """0/1 matrix [B, Hkv, H // Hkv * num_q_blocks, num_k_blocks] of the marginal blocks."""
    B, H, num_q_blocks, num_k_blocks = block_map.shape
    return (block_map == 0).to(dtype).view(B, num_kv_heads, H // num_kv_heads * num_q_blocks, num_k_blocks)


def gather_marginal(sums, z, block_map, weight):
    """What the forward kernel needs of the sums of `prepare` when only marginal blocks are summed: m [B, H,
    num_q_blocks, F, D] in their dtype and z [.., F] float32. sums: [B, Hkv, num_k_blocks, D, F]."""
    B, Hkv, _, D, F = sums.shape
    H, num_q_blocks, num_k_blocks = block_map.shape[1:]
    rows = marginal_rows(block_map, Hkv, sums.dtype)
    projected = sums.mT @ weight.to(sums.dtype).t()
    m = (rows @ projected.view(B, Hkv, num_k_blocks, F * D)).view(B, H, num_q_blocks, F, D)
    return m, (rows.float() @ z).view(B, H, num_q_blocks, F)


def scatter_marginal(dm, dz, block_map, weight, sums, norm):
    """From dM [.., D, F] and dz of query blocks to norm dH [B, Hkv, num_k_blocks, F, D] in dM's dtype, norm dz of key
    blocks, and dW. sums: of key blocks, as above."""
    B, Hkv, _, D, F = sums.shape
    columns = marginal_rows(block_map, Hkv, dm.dtype).transpose(2, 3)
    dm = (columns @ dm.view(B, Hkv, -1, D * F)).view(sums.shape).mT
    dz = columns.float() @ dz.view(B, Hkv, -1, F)
    sums = sums.to(dm.dtype)
    dweight = 0.0
    for part, part_sums in zip(dm.chunk(8, 2), sums.chunk(8, 2)):  # one sum over all features is less exact
        dweight += (part.flatten(2, 3).mT @ part_sums.mT.flatten(2, 3)).float().sum((0, 1))
    return dm @ weight.to(dm.dtype) * norm, dz * norm, dweight
