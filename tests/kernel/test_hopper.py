"""The kernels in Gluon, of hopper.py, hopper_linear.py and hopper_prepare.py: what they are launched for, what they
compute on a Hopper GPU. That they compile: test_launch.py."""

import random

import pytest
import torch
import torch.nn.functional as F
from cases import Case, check

from diffusers_sla.kernel import forward, launch, linear, prepare, sla_attention
from diffusers_sla.kernel.plan import Now


class Launched:
    """Stands for a run: keeps the kernel's name."""

    def launch(self, kernel, *_, **__):
        self.name = kernel.__name__

    def empty(self, shape, dtype=torch.float32, strides=None):
        return torch.empty(shape, dtype=dtype)


def launched_for(q=None, D=128, dtype=torch.bfloat16, blkq=64, blkk=64, mask=None, a=None, phi="softmax", scale=0.1):
    k = torch.zeros(1, 2, 256, D, dtype=dtype)
    q, run, m = k if q is None else q, Launched(), torch.zeros(1, 2, 1, D, D, dtype=dtype)
    indices = torch.zeros(1, 2, 256 // blkq, 1, dtype=torch.int32)
    forward.sparse_fwd(
        run, q, k, k, None, indices, mask, m, m, a, None, torch.empty_like(q), None, None,
        blkq, blkk, (0, 0), (3, 5), phi, scale, 1e-5,
    )  # fmt: skip
    return run.name


def test_it_takes_what_it_can(monkeypatch):
    assert launched_for() == "_sparse_fwd_kernel"
    if not launch.knows_gluon():
        pytest.skip("this Triton has another Gluon")
    monkeypatch.setattr(launch, "has_gluon", lambda device: True)
    rows = torch.zeros(256 * 136 + 8, dtype=torch.bfloat16)
    for served in ({}, {"D": 64}, {"dtype": torch.float16}, {"blkq": 128}, {"phi": "elu"}):
        assert launched_for(**served) == "_hopper_fwd_kernel", served
    for other in (
        {"D": 96}, {"D": 256}, {"dtype": torch.float32}, {"blkq": 32}, {"blkk": 128}, {"phi": "hedgehog"},
        {"scale": -0.1}, {"mask": torch.ones(1, 256, dtype=torch.bool)}, {"a": torch.eye(128)},
        {"q": rows.as_strided((1, 2, 128, 128), (256 * 136, 128 * 136, 136, 1))},
        {"q": rows[1:].as_strided((1, 2, 128, 128), (2 * 128 * 128, 128 * 128, 128, 1))},
    ):  # fmt: skip
        assert launched_for(**other) == "_sparse_fwd_kernel", other


def prepare_launched_for(
    q=None, D=128, dtype=torch.bfloat16, blkq=64, blkk=64, mask=None, phi="softmax", linear="all", pool=True
):  # fmt: skip
    k, run = torch.zeros(1, 2, 256, D, dtype=dtype), Launched()
    prepare.prepare(
        run, k if q is None else q, k, k, None, mask, blkq, blkk, (0, 0), (3, 5), phi, linear, pool, 0.5
    )  # fmt: skip
    return run.name


def test_passes_over_q_k_v_it_takes(monkeypatch):
    assert prepare_launched_for() == "_prepare_kernel"
    if not launch.knows_gluon():
        pytest.skip("this Triton has another Gluon")
    monkeypatch.setattr(launch, "has_gluon", lambda device: True)
    for served in (
        {}, {"D": 64}, {"dtype": torch.float16}, {"blkq": 128}, {"phi": "elu"}, {"linear": "none"},
        {"q": torch.zeros(1, 2, 384, 128, dtype=torch.bfloat16)},
    ):  # fmt: skip
        assert prepare_launched_for(**served) == "_hopper_prepare_kernel", served
    rows = torch.zeros(256 * 136 * 2, dtype=torch.bfloat16)
    for other in (
        {"D": 96}, {"dtype": torch.float32}, {"blkq": 32}, {"blkk": 128}, {"phi": "hedgehog"}, {"linear": "marginal"},
        {"pool": False}, {"mask": torch.ones(1, 256, dtype=torch.bool)},
        {"q": rows.as_strided((1, 2, 256, 128), (256 * 136, 128, 136, 1))},
        {"q": torch.zeros(1, 4, 256, 128, dtype=torch.bfloat16)},
        {"q": torch.zeros(1, 2, 385, 128, dtype=torch.bfloat16)},
    ):  # fmt: skip
        assert prepare_launched_for(**other) == "_prepare_kernel", other


def gradients_launched_for(x=None, D=128, dtype=torch.bfloat16, mask=None, phi="softmax", marginal=False):
    """The kernels of the gradients of phi(q) and phi(k)."""
    q = torch.zeros(1, 2, 256, D, dtype=dtype)
    x, names, m = q if x is None else x, [], torch.zeros(1, 2, 1, (2 if phi == "hedgehog" else 1) * D, D, dtype=dtype)
    z, w = torch.zeros(m.shape[:-1]), torch.zeros(D, D)
    for call in (
        lambda run: linear.linear_bwd_q(run, x, q, m, z, q, 64, (3, 5), phi, 1e-5, marginal, mask),
        lambda run: linear.linear_bwd_k(
            run, x, q, mask, m, z, q, q, 64, (3, 5), phi, None if marginal else (m, m, w, w, None)
        ),
    ):
        run = Launched()
        call(run)
        names.append(run.name)
    return names


def test_gradients_it_takes(monkeypatch):
    of_triton = ["_linear_bwd_q_kernel", "_linear_bwd_k_kernel"]
    assert gradients_launched_for() == of_triton
    if not launch.knows_gluon():
        pytest.skip("this Triton has another Gluon")
    monkeypatch.setattr(launch, "has_gluon", lambda device: True)
    of_gluon = ["_hopper_linear_bwd_q_kernel", "_hopper_linear_bwd_k_kernel"]
    for served in ({}, {"D": 64}, {"phi": "relu"}):
        assert gradients_launched_for(**served) == of_gluon, served
    rows = torch.zeros(256 * 136 * 2, dtype=torch.bfloat16)
    for other in (
        {"D": 96}, {"dtype": torch.float32}, {"dtype": torch.float16}, {"phi": "hedgehog"}, {"marginal": True},
        {"mask": torch.ones(1, 256, dtype=torch.bool)},
        {"x": rows.as_strided((1, 2, 128, 128), (256 * 136, 128 * 136, 136, 1))},
    ):  # fmt: skip
        assert gradients_launched_for(**other) == of_triton, other


def test_programs_fill_the_gpu_a_whole_number_of_times():
    from_tiles = [(36, 24, 132), (256, 12, 132), (10, 80, 132), (1, 1, 132), (5, 1, 396)]
    if not launch.knows_gluon():
        pytest.skip("this Triton has another Gluon")
    from diffusers_sla.kernel.hopper_linear import tiles_of_a_program

    # 120 programs of 8 tiles; 132 of 24; 240 of 4 in two waves, not 80 of 10; one; a tile each
    assert [tiles_of_a_program(*given) for given in from_tiles] == [8, 24, 4, 1, 1]


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels in Gluon that were launched; another forward fails."""
    if not torch.cuda.is_available() or not launch.has_gluon(torch.device("cuda")):
        pytest.skip("needs a Hopper GPU")
    from diffusers_sla.kernel import hopper, hopper_linear, hopper_prepare

    names = []

    def counted(kernel):
        class Counted(type(kernel)):
            def __getitem__(self, grid):
                names.append(kernel.__name__)
                return super().__getitem__(grid)

        monkeypatch.setattr(kernel, "__class__", Counted)

    counted(hopper_prepare._hopper_prepare_kernel)
    counted(hopper._hopper_fwd_kernel)
    counted(hopper_linear._hopper_linear_bwd_q_kernel)
    counted(hopper_linear._hopper_linear_bwd_k_kernel)
    monkeypatch.setattr(forward, "_sparse_fwd_kernel", None)
    return names


def launched(case):
    """What `check` of a case launches: the choice alone, a forward and a backward."""
    names = ["_hopper_prepare_kernel"] * (1 if case.linear == "marginal" else 2)
    if 2 * case.H * case.Lq > 3 * case.Hkv * case.Lk:
        names = []
    gradients = ["_hopper_linear_bwd_q_kernel", "_hopper_linear_bwd_k_kernel"]
    served = case.linear == "all" and case.dtype == torch.bfloat16
    return [*names, "_hopper_fwd_kernel", *(gradients if served else [])]


def any_case(seed):
    draw = random.Random(seed)
    Hkv = draw.choice([1, 2, 3])
    Lq = draw.randint(8, 700)
    Lk = draw.choice([Lq, draw.randint(8, 700)])
    return Case(
        B=draw.choice([1, 2]), H=Hkv * draw.choice([1, 1, 2]), Hkv=Hkv, Lq=Lq, Lk=Lk, D=draw.choice([64, 128]),
        dtype=draw.choice([torch.float16, torch.bfloat16, torch.bfloat16]), topk=draw.choice([0.05, 0.2, 0.5, 1.0]),
        blkq=draw.choice([64, 128]), blkk=64, feature_map=draw.choice(["softmax", "softmax", "elu", "relu"]),
        linear=draw.choice(["all", "all", "marginal", "none"]), scale=draw.choice([None, None, 0.3]),
        keep_q=(draw.choice([0, Lq // 4]), draw.choice([0, Lq // 3])),
        keep_k=(draw.choice([0, Lk // 4]), draw.choice([0, Lk // 3])), blhd=draw.random() < 0.5,
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(100))
def test_random_configurations(seed, launches):
    case = any_case(seed)
    check(case, "triton", "cuda")
    assert launches == launched(case)


@pytest.mark.gpu
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("phi", ["softmax", "elu", "relu"])
@pytest.mark.parametrize(
    ("heads", "lengths", "blkq", "keep"),
    [
        ((2, 2), (640, 640), 64, 0), ((6, 2), (499, 1000), 128, 5), ((4, 4), (75, 9000), 128, 0),
        ((2, 2), (190, 130), 64, 40), ((2, 1), (6000, 9000), 128, 3),
    ],
)  # fmt: skip
def test_means_and_sums(D, phi, heads, lengths, blkq, keep, launches):
    torch.manual_seed(0)
    (H, Hkv), (Lq, Lk) = heads, lengths
    q, k, v = (
        torch.randn(2, length, h, D, device="cuda", dtype=torch.float16).transpose(1, 2)
        for h, length in ((H, Lq), (Hkv, Lk), (Hkv, Lk))
    )
    run, keeps = Now(q.device), ((keep, 0), (0, keep))
    q_mean, k_mean, _, sums, z = prepare.prepare(run, q, k, v, None, None, blkq, 64, *keeps, phi, "all", True, 0.25)
    for got, x, blk in ((q_mean, q[:, :, keep:], blkq), (k_mean, k[:, :, : Lk - keep], 64)):
        want = torch.stack([block.double().mean(2) for block in x.split(blk, 2)], 2)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    x = k[:, :, : Lk - keep].double()
    f = {"softmax": lambda x: x.softmax(-1), "elu": lambda x: F.elu(x) + 1, "relu": F.relu}[phi](x)
    want = 0.25 * v[:, :, : Lk - keep].double().mT @ f
    torch.testing.assert_close(sums.double().sum(2), want, rtol=2e-3, atol=2e-3 * want.abs().max().item())
    torch.testing.assert_close(z.double().sum(2), 0.25 * f.sum(2), rtol=1e-3, atol=1e-3)
    assert launches == ["_hopper_prepare_kernel"]
    q[0, 0, keep + 70, 3] = k[0, 0, 3, 5] = float("nan")
    q_mean, k_mean, *_ = prepare.prepare(run, q, k, v, None, None, blkq, 64, *keeps, phi, "none", True, 0.25)
    assert q_mean.isnan().nonzero().tolist() == [[0, 0, 70 // blkq, 3]]
    assert k_mean.isnan().nonzero().tolist() == [[0, 0, 0, 5]]


@pytest.mark.gpu
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("edge", [(64, 64), (1, 1), (65, 63), (128, 640), (1, 300)])
def test_whole_ragged_and_single_tokens(D, edge, launches):
    Lq, Lk = edge
    case = Case(Lq=Lq, Lk=Lk, D=D, dtype=torch.bfloat16, topk=0.3, blkq=64, blkk=64)
    check(case, "triton", "cuda")
    assert launches == launched(case)


@pytest.mark.gpu
def test_large_scores_stay_finite(launches):
    case = Case(Lq=300, Lk=300, D=128, dtype=torch.bfloat16, topk=0.3, blkq=64, blkk=64, size=30.0)
    check(case, "triton", "cuda")


@pytest.mark.gpu
def test_a_sequence_without_a_key_leaves_the_others_gradients_alone():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 4096, 128, device="cuda", dtype=torch.float16, requires_grad=True) for _ in range(3))
    weight = torch.randn(128, 128, device="cuda", requires_grad=True)

    def gradients(key_mask, *given):
        o = sla_attention(*given, topk=0.1, proj_l_weight=weight, key_mask=key_mask, impl="triton")
        return torch.autograd.grad(o[:1].float().square().sum(), (*given, weight))

    masked = gradients(torch.tensor([[True], [False]], device="cuda").expand(2, 4096), q, k, v)
    alone = gradients(None, q[:1], k[:1], v[:1])
    for x, y in zip(masked, alone, strict=True):
        torch.testing.assert_close(x[: len(y)], y, rtol=1e-2, atol=1e-2 * y.abs().max().item())
    assert all((x[1] == 0).all() for x in masked[:3])


@pytest.mark.gpu
@pytest.mark.parametrize("D", [64, 128])
def test_every_run_gives_the_same_bits(D, launches):
    torch.manual_seed(0)
    q, k, v, do = (torch.randn(1, 8, 2000, D, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    weight = torch.randn(D, D, device="cuda")

    def call():
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        o = sla_attention(*leaves, topk=0.2, proj_l_weight=weight, keep_q=(0, 100), keep_k=(0, 100), impl="triton")
        return o.detach(), *torch.autograd.grad(o, leaves, do)

    first = call()
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(call(), first, strict=True))
