import pytest
import torch

from diffusers_sla.kernel import select_blocks


@pytest.mark.parametrize("impl", ["triton", "eager"])
@pytest.mark.parametrize("skip", [0.0, 0.4])
def test_the_choice_is_the_definitions(impl, skip, device):
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 100, 24, device=device), torch.randn(2, 2, 150, 24, device=device)
    mask = torch.rand(2, 150, device=device) > 0.4
    mask[0, 16:48] = False  # two whole blocks without a key
    settings = {"topk": 0.3, "blkq": 32, "blkk": 16, "skip": skip, "key_mask": mask, "keep_k": (0, 6)}
    chosen = select_blocks(q, k, **settings, impl=impl)
    assert torch.equal(chosen, select_blocks(q, k, **settings, impl="reference"))
    assert (chosen == 1).sum(-1).unique().tolist() == [int(0.3 * 9)]
    assert (chosen == -1).sum(-1).unique().tolist() == [int(skip * 9)]


@pytest.mark.parametrize("num_k_blocks", [512, 513, 1300])
def test_many_blocks_are_read_a_tile_at_a_time(num_k_blocks, device):
    torch.manual_seed(0)
    q, k = (
        torch.randn(1, 1, 40, 16, device=device),
        torch.randn(1, 1, 16 * num_k_blocks - 3, 16, device=device).round(),
    )
    k[..., 16 * 200 : 16 * 400, :] = 0.0  # ties across tiles
    settings = {"topk": 0.5, "blkq": 16, "blkk": 16, "skip": 0.4}
    chosen = select_blocks(q, k, **settings, impl="triton")
    assert torch.equal(chosen, select_blocks(q, k, **settings, impl="reference"))


@pytest.mark.parametrize("num_k_blocks", [5, 300, 1300])
def test_the_list_has_the_maps_blocks_in_order(num_k_blocks, device):
    from diffusers_sla.kernel.plan import Now
    from diffusers_sla.kernel.selection import indices_of, select

    torch.manual_seed(0)
    q_mean, k_mean = (torch.randn(2, 2, n, 16, device=device).round() for n in (19, num_k_blocks))
    indices = torch.empty(2, 2, 19, int(0.6 * num_k_blocks), dtype=torch.int32, device=device)
    chosen = torch.empty(2, 2, 19, num_k_blocks, dtype=torch.int8, device=device)
    select(Now(q_mean.device), q_mean, k_mean, None, 0.0, 1.0, torch.float32, indices, chosen)
    assert torch.equal(indices, indices_of(chosen, 0.6))


@pytest.mark.parametrize("impl", ["triton", "eager", "reference"])
def test_scores_of_either_zero_are_equal(impl, device):
    torch.manual_seed(0)
    q, k = (torch.randn(1, 2, 64, 16, device=device) for _ in range(2))
    chosen = select_blocks(q, k, topk=0.5, blkq=16, blkk=16, scale=0.0, impl=impl)
    assert chosen.flatten(0, 2).tolist() == [[1, 1, 0, 0]] * 8


@pytest.mark.parametrize("impl", ["triton", "eager", "reference"])
def test_ties_go_to_the_lower_index(impl, device):
    q = k = torch.ones(1, 1, 64, 16, device=device)
    chosen = select_blocks(q, k, topk=0.5, blkq=16, blkk=16, skip=0.25, impl=impl)
    assert chosen[0, 0].tolist() == [[1, 1, 0, -1]] * 4


@pytest.mark.parametrize("impl", ["triton", "eager", "reference"])
def test_a_hidden_block_is_not_chosen_for_a_nan_either(impl, device):
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 32, 16, device=device), torch.randn(1, 1, 64, 16, device=device)
    q[0, 0, 3, 5] = float("nan")
    mask = torch.ones(1, 64, dtype=torch.bool, device=device)
    mask[0, :16] = False
    chosen = select_blocks(q, k, topk=0.25, blkq=16, blkk=16, key_mask=mask, impl=impl)
    assert chosen[0, 0, :, 0].tolist() == [0, 0]
    assert chosen[0, 0, 0].tolist() == [0, 1, 0, 0]


def test_the_inverse_list_names_who_chose_each_block(device):
    from diffusers_sla.kernel import backward
    from diffusers_sla.kernel.plan import Now
    from diffusers_sla.kernel.selection import indices_of

    class Listing(Now):
        """Launches only the programs that make the list, and keeps it."""

        def launch(self, kernel, grid, *arguments, **constants):
            given = dict(zip(kernel.arg_names, arguments, strict=False))
            if "num_inverting" in given:
                super().launch(kernel, (given["num_inverting"], *grid[1:]), *arguments, **constants)
                self.made = [given[f"{name}_ptr"] for name in ("starts", "counts", "list")]

    # More key blocks than a program takes, and more of them listed than it counts at a time.
    q, k = torch.randn(1, 2, 16 * 130, 16, device=device), torch.randn(1, 2, 16 * 70, 16, device=device)
    chosen = select_blocks(q, k, topk=0.3, blkq=16, blkk=16, impl="reference")
    indices, run = indices_of(chosen, 0.3), Listing(q.device)
    lse = torch.zeros(2, 1, 2, 16 * 130, device=device)
    gradients = [torch.empty_like(x) for x in (q, k, k)]
    backward.sparse_bwd(
        run, q, q, k, k, q, lse, indices, chosen, None, *gradients, 16, 16, (0, 0), (0, 0), 1.0, False
    )  # fmt: skip
    starts, counts, listed = run.made
    for head in range(2):
        for block in range(70):
            rows = listed[head, starts[head, block] :][: counts[head, block]].tolist()
            assert rows == (chosen[0, head, :, block] == 1).nonzero().flatten().tolist()
