"""Lent experts: the division of copies, what ranks compute in a step, and where gradients are summed.

T tokens, K choices, E experts, R ranks, H experts of a rank, S lent.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor

from moe_dtensor.config.check import check
from moe_dtensor.config.load import override
from moe_dtensor.config.resolve import resolve
from moe_dtensor.config.schema import Config
from moe_dtensor.data import Loader, build_corpus
from moe_dtensor.mesh import build_mesh
from moe_dtensor.parallel.collectives import describe
from moe_dtensor.parallel.lending import _WithLent, divide, most_copies, slots_of_copies
from moe_dtensor.testing.ranks import run_on_ranks
from moe_dtensor.train.build import Trainer, build
from moe_dtensor.train.step import read_batch
from moe_dtensor.verify.fuzz import SMALLEST
from moe_dtensor.verify.miniature import Case, Layout, whole_case
from moe_dtensor.verify.run import prove

Keys = dict[str, Any]
E = 16


def chosen(router: str, tokens: int = 512, choices: int = 4) -> Tensor:
    """Ids ``(T, K)`` of different experts by chance."""
    generator = torch.Generator().manual_seed(7)
    gumbel_TE = -(-torch.rand(tokens, E, generator=generator, dtype=torch.float64).log()).log()
    if router == "zipf":
        gumbel_TE -= torch.arange(1, E + 1).double().log()
    if router == "from the last":
        gumbel_TE += 20 * torch.arange(E)
    expert_TK = gumbel_TE.topk(choices).indices
    if router == "all to the first four":
        return torch.arange(tokens)[:, None].add(torch.arange(choices)) % 4
    if router == "with absent copies":
        expert_TK[::3], expert_TK[:, 1] = -1, -1
    if router == "no copy":
        expert_TK.fill_(-1)
    return expert_TK


ROUTERS = ("uniform", "zipf", "from the last", "all to the first four", "with absent copies", "no copy")


def loads(router: str, ranks: int, lent: int) -> tuple[Tensor, Tensor, Tensor]:
    """Copies by rank without lending and with it; how many each could give up at most. Each copy must be computed once,
    with the weights of its expert."""
    expert_TK = chosen(router)
    parts = [slots_of_copies(expert_TK, E, ranks, lent, rank) for rank in range(ranks)]
    held = E // ranks
    lent_RS = torch.stack([lent_S + rank * held for rank, (_, lent_S) in enumerate(parts)])
    computed_TK = torch.zeros_like(expert_TK)
    for rank, (slot_TK, _) in enumerate(parts):
        at_hand = torch.cat([torch.arange(rank * held, (rank + 1) * held), lent_RS.flatten()])
        assert torch.equal(at_hand[slot_TK[slot_TK >= 0]], expert_TK[slot_TK >= 0])
        computed_TK += slot_TK >= 0
    assert torch.equal(computed_TK, (expert_TK >= 0).long())
    count_RH = torch.bincount(expert_TK[expert_TK >= 0], minlength=E).view(ranks, -1)
    most_R = count_RH.sort(1, descending=True).values[:, :lent].sum(1)
    return count_RH.sum(1), torch.tensor([(slot_TK >= 0).sum() for slot_TK, _ in parts]), most_R


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize(("ranks", "lent"), [(2, 1), (2, 3), (2, 8), (4, 1), (4, 2), (4, 4), (8, 1), (8, 2), (1, 2)])
def test_ranks_are_at_the_mean_or_have_given_up_all_they_lend(router: str, ranks: int, lent: int) -> None:
    alone, divided, given = loads(router, ranks, lent)
    mean = -(-int(alone.sum()) // ranks)
    assert (divided <= (alone - given).clamp(min=mean)).all()
    assert (divided >= alone.clamp(max=mean)).all(), "none gives up more than it must"
    if lent == E // ranks:
        assert divided.max() == mean
    most = most_copies(512, 4, ranks, E // ranks, lent)
    assert divided.max() <= most
    if router == "all to the first four" and ranks == 4:  # a token has K = H = 4 choices on one rank, evenly
        assert divided.max() == most


def test_two_of_eight_experts_even_out_zipf() -> None:
    alone, divided, _ = loads("zipf", 2, 2)
    assert alone.max() > 1.4 * alone.double().mean()
    assert divided.max() < 1.05 * divided.double().mean()


def test_equal_loads_of_experts_divide_alike() -> None:
    """Which of equal experts is the hotter must not be chance: every rank has to find the same."""
    count_E = torch.tensor([5, 5, 5, 5, 0, 0, 0, 0])
    parts = [divide(count_E, 2, 2, rank) for rank in range(2)]
    assert parts[0].lent_S.tolist() == [0, 1]
    assert parts[0].end_E.tolist()[:4] == [0, 0, 5, 5]
    assert parts[1].first_E.tolist()[:2] == [0, 0]
    assert parts[1].end_E.tolist()[:2] == [5, 5]
    assert parts[1].slot_E.tolist()[:2] == [4, 5]


def test_the_host_reads_nothing() -> None:
    """A tensor that has no values tells of each read."""
    with FakeTensorMode():
        slot_TK, lent_S = slots_of_copies(torch.zeros(64, 4, dtype=torch.int64), E, 4, 2, 1)
    assert (slot_TK.shape, lent_S.shape) == ((64, 4), (2,))


# In steps.

SMALL: Keys = SMALLEST | {
    "model.vocab_size": 257,
    "moe.num_experts": 8,
    "moe.top_k": 2,
    "moe.router": "zipf",
    "mesh.experts": "dp",
    "training.global_batch_size": 8,
}
FLOAT32: Keys = {f"training.{key}": "float32" for key in ("dtype", "param_dtype", "reduce_dtype")}
MIXED: Keys = FLOAT32 | {"training.param_dtype": "bfloat16"}


def start(keys: Keys) -> Trainer:
    config = override(Config(), SMALL | keys)
    check(config, dist.get_world_size())
    return build(resolve(config, dist.get_world_size()), torch.device("cpu"))


def _rows(keys: Keys) -> list[int]:
    """Copies that this rank's experts compute in a step, by block."""
    trainer = start(keys)
    rows = []
    for block in trainer.parts[0].layers.values():
        experts = block.moe.experts

        def count(module: Any, args: Any, held: int = 8 // dist.get_world_size()) -> None:
            ids = args[2] if len(args) > 3 else args[2] - module.first_expert
            rows.append(int(((ids >= 0) & (ids < (8 if len(args) > 3 else held))).sum()))

        experts.register_forward_pre_hook(count)
    batch = read_batch(trainer, Loader(trainer.config, build_corpus(trainer.config)))
    trainer.runner.step(batch, torch.tensor(1.0))
    return rows


def test_the_fullest_rank_of_a_step_computes_less() -> None:
    copies = 2 * 16 * 2  # sequences on both ranks, positions, choices
    alone = run_on_ranks(_rows, 2, {"training.seq_len": 16})
    divided = run_on_ranks(_rows, 2, {"training.seq_len": 16, "mesh.lent_experts": 2})
    for of_ranks in (alone, divided):
        assert {sum(rows) for rows in zip(*of_ranks, strict=True)} == {copies}
    fullest = [max(rows) / (sum(rows) / 2) for rows in zip(*alone, strict=True)]
    assert sum(fullest) / len(fullest) > 1.4
    assert max(max(rows) / (sum(rows) / 2) for rows in zip(*divided, strict=True)) <= 1.05


def _gradient_at_home(param_dtype: torch.dtype, reduce_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of a weight of two experts on each of two ranks, of which the second is lent: what it computes with, and its
    gradient. On rank 1 the lent slots' gradients are 2^-9 times those on rank 0."""
    mesh = build_mesh(resolve(override(Config(), {"mesh.dp": 2}), 2), torch.device("cpu"))["dp"]
    rank = dist.get_rank()
    master = torch.tensor([[rank + 1.0], [rank + 10.0]]).requires_grad_()
    cast = None if param_dtype == torch.float32 else master.detach().to(param_dtype)
    gather = describe(mesh, "all_gather", "reduce_scatter")
    weights = _WithLent.apply(master, cast, torch.tensor([1]), gather, reduce_dtype)
    gradient = 2.0 ** -torch.tensor([[0.0], [2.0], [4.0 + 9 * rank], [6.0 + 9 * rank]])
    weights.backward(gradient.to(param_dtype))
    assert master.grad is not None
    return weights.detach().float(), master.grad


@pytest.mark.parametrize("param_dtype", [torch.float32, torch.bfloat16])
def test_gradients_go_home_and_are_summed_in_the_wider_dtype(param_dtype: torch.dtype) -> None:
    """bfloat16 has eight binary digits, which neither ``2^-4 + 2^-13`` nor ``2^-6 + 2^-15`` has room in."""
    found = run_on_ranks(_gradient_at_home, 2, param_dtype, torch.float32)
    for rank, (weights, gradient) in enumerate(found):
        assert weights.flatten().tolist() == [rank + 1, rank + 10, 10, 11]
        assert gradient.flatten().tolist() == [1, 2**-2 + 2 ** -(4 + 2 * rank) + 2 ** -(13 + 2 * rank)]
        assert gradient.dtype == torch.float32


def _gradients(keys: Keys) -> dict[str, Tensor]:
    trainer = start(keys)
    trainer.runner.step(read_batch(trainer, Loader(trainer.config, build_corpus(trainer.config))), torch.tensor(1.0))
    grads = {name: param.grad for name, param in trainer.parts[0].named_parameters() if ".experts." in name}
    return {name: grad.full_tensor() for name, grad in grads.items() if isinstance(grad, DTensor)}


def test_room_for_the_worst_case_changes_no_bit() -> None:
    """No rank computes more rows with lent experts than the most that it could have alone."""
    keys = FLOAT32 | {"mesh.lent_experts": 2, "moe.backend": "torch"}
    exact, worst = (run_on_ranks(_gradients, 2, keys | {"moe.rows": rows})[0] for rows in ("exact", "worst"))
    assert exact.keys() == worst.keys()
    assert len(exact) == 4
    assert all(torch.equal(exact[name], worst[name]) for name in exact)


def test_mixed_precision_is_as_near_as_without() -> None:
    plain, lent = (run_on_ranks(_gradients, 2, MIXED | {"mesh.lent_experts": n})[0] for n in (0, 2))
    for name, gradient in plain.items():
        assert (lent[name] - gradient).norm() < 2**-7 * gradient.norm(), name


def case(layout: Layout, keys: Keys, whole: bool = False) -> Case:
    config = override(Config(), SMALL | {"mesh.lent_experts": 2} | keys)
    layout.place(config)
    return whole_case(layout, config) if whole else Case(layout, config)


TWO = Layout(2, 1, 1)
ON_TWO = [
    case(TWO, {}, whole=True),
    case(TWO, {"moe.router": "topk", "moe.expert_bias": True, "activation_checkpoint.mode": "full"}),
    case(TWO, {"moe.router": "sinkhorn", "mesh.lent_experts": 4, "moe.rows": "worst"}),
    case(TWO, {"moe.top_k": 1, "moe.gate_on": "input", "activation_checkpoint.mode": "selective"}),
    case(TWO, {"moe.capacity_factor": 1.1, "moe.num_shared_experts": 1, "training.microbatch_size": 2}),
    case(TWO, {"moe.router": "expert_choice", "mesh.lent_experts": 1}),
]
ON_TP = [
    case(Layout(1, 1, 2), {"mesh.experts": "tp"}),
    case(Layout(1, 1, 2), {"mesh.experts": "tp", "mesh.sequence_parallel": False, "moe.num_shared_experts": 1}),
]
FOUR, BOTH = Layout(4, 1, 1), Layout(2, 1, 2)
ON_FOUR = [
    case(FOUR, {"moe.top_k": 3}, whole=True),
    case(FOUR, {"moe.router": "topk", "mesh.expert_ranks": 2, "moe.expert_bias": True}),
    case(FOUR, {"mesh.expert_ranks": 2, "mesh.expert_weights": "sharded"}),
    case(FOUR, {"mesh.dp_replicate": 2, "moe.router": "sinkhorn"}),
    case(BOTH, {}),
    case(BOTH, {"mesh.experts": "dp_tp", "moe.num_shared_experts": 1}),
    case(BOTH, {"mesh.experts": "dp_tp", "mesh.sequence_parallel": False}),
    case(BOTH, {"mesh.experts": "tp", "activation_checkpoint.mode": "full"}, whole=True),
    case(Layout(2, 2, 1, "1F1B"), {"activation_checkpoint.mode": "selective"}),
    case(Layout(2, 2, 1, "ZBVZeroBubble"), {"model.num_layers": 4, "moe.expert_bias": True}, whole=True),
    case(Layout(2, 2, 1, "DualPipeV"), {"model.num_layers": 4, "activation_checkpoint.mode": "full"}),
]
"""Placements, levels and schedules; in the last two the backward pass is split."""


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(ON_TWO[:4], id="dp"),
        pytest.param(ON_TWO[4:], id="limits", marks=pytest.mark.full),
        pytest.param(ON_TP, id="tp", marks=pytest.mark.full),
        pytest.param(ON_FOUR, id="four ranks", marks=pytest.mark.full),
    ],
)
def test_it_is_the_oracles(cases: list[Case]) -> None:
    for each, verdict in zip(cases, prove(cases), strict=True):
        assert verdict.ok, f"{verdict.mesh} {verdict.schedule} {each.config.mesh}: {verdict.worst} {verdict.failure}"
