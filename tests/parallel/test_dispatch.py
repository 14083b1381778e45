"""Dispatches and experts outside of FSDP: what no config-level proof can see.

B sequences, S positions, D width, K choices, E experts. Everything in float64 unless said.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from moe_dtensor.checkpoint.manager import CheckpointManager
from moe_dtensor.config.check import check
from moe_dtensor.config.load import override
from moe_dtensor.config.resolve import resolve
from moe_dtensor.config.schema import Config
from moe_dtensor.data import Batch, Loader, build_corpus
from moe_dtensor.kernels.experts.mlp import reference_mlp
from moe_dtensor.layers.moe import MoE
from moe_dtensor.testing.bytes_sent import BytesSent
from moe_dtensor.testing.ranks import run_on_ranks
from moe_dtensor.train.build import Trainer, build
from moe_dtensor.train.step import evaluate, read_batch, train_step

Keys = dict[str, Any]
E, K, D, S = 8, 3, 16, 8
SMALL: Keys = {
    "model.dim": D,
    "model.num_layers": 1,
    "model.num_heads": 4,
    "model.vocab_size": 257,
    "moe.num_experts": E,
    "moe.top_k": K,
    "moe.hidden_dim": 12,
    "moe.router": "hash",
    "data.corpus": "random",
    "training.seq_len": S,
    "training.microbatch_size": 1,
    "training.global_batch_size": 4,
    "training.dtype": "float64",
    "training.param_dtype": "float64",
    "training.reduce_dtype": "float64",
    "lr_scheduler.warmup_steps": 1,
}
FLOAT32: Keys = {f"training.{key}": "float32" for key in ("dtype", "param_dtype", "reduce_dtype")}
MIXED: Keys = FLOAT32 | {"training.param_dtype": "bfloat16"}
WHOLE: Keys = {"mesh.sequence_parallel": False}


def on(mesh: str, **keys: Any) -> Keys:
    dp, pp, tp = map(int, mesh.split("x"))
    named = {key.replace("__", "."): value for key, value in keys.items()}
    return {"mesh.dp": dp, "mesh.pp": pp, "mesh.tp": tp} | named


def start(keys: Keys) -> Trainer:
    config = override(Config(), SMALL | keys)
    check(config, dist.get_world_size())
    return build(resolve(config, dist.get_world_size()), torch.device("cpu"))


def batch_of(trainer: Trainer) -> Batch:
    return read_batch(trainer, Loader(trainer.config, build_corpus(trainer.config)))


def gathered(trainer: Trainer) -> MoE:
    """The first block's experts, its weights at hand."""
    block = trainer.parts[0].layers["0"]
    block.unshard()
    return block.moe


def dispatched(moe: MoE, x_BSD: Tensor, gate_BSK: Tensor, expert_BSK: Tensor) -> Tensor:
    """What the block's experts make of tokens that go where the ids say."""
    route = gate_BSK.flatten(0, 1), expert_BSK.flatten(0, 1), torch.empty(0)
    y_TD, _ = moe.dispatch(moe.experts, None, x_BSD.flatten(0, 1), lambda: route)
    return y_TD.view(x_BSD.shape)


# Routes of a microbatch on each of dp ranks: ids (dp, S, K).


def by_chance(dp: int, positions: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(dp, positions, E, generator=generator).argsort(-1)[..., :K]


def to_one_rank(dp: int, positions: int) -> Tensor:
    """The first two experts take all, so that other ranks get no token."""
    return torch.tensor([0, 1, -1]).expand(dp, positions, K).clone()


def with_absent(dp: int, positions: int) -> Tensor:
    """Some choices have no copy, and some tokens none at all."""
    expert_BSK = by_chance(dp, positions)
    expert_BSK[:, 1::2, 0] = -1
    expert_BSK[:, ::3] = -1
    return expert_BSK


ROUTES = {"by chance": by_chance, "to one rank": to_one_rank, "with absent copies": with_absent}


def inputs(trainer: Trainer, route: str) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's ``(B, S, ...)`` of vectors, gates and ids: the same tokens on every mesh with so many dp ranks."""
    mesh, positions = trainer.config.mesh, trainer.config.training.seq_len
    generator = torch.Generator().manual_seed(4)
    x, gate = (torch.randn(mesh.dp, positions, n, generator=generator).double() for n in (D, K))
    rank = trainer.mesh["dp"].get_local_rank()
    own = [tensor[rank : rank + 1] for tensor in (x, gate, ROUTES[route](mesh.dp, positions))]
    if mesh.sequence_parallel:
        own = [tensor.chunk(mesh.tp, 1)[trainer.mesh["tp"].get_local_rank()] for tensor in own]
    return own[0].clone().requires_grad_(), own[1].clone().requires_grad_(), own[2].clone()


def by_hand(trainer: Trainer, x_BSD: Tensor, gate_BSK: Tensor, expert_BSK: Tensor) -> Tensor:
    """The same with all experts in one place."""
    weights = {name: param.full_tensor() for name, param in trainer.parts[0].named_parameters() if ".experts." in name}
    flat = [t.detach().flatten(0, 1) for t in (x_BSD, gate_BSK, expert_BSK)]
    y_TD = reference_mlp(flat[0], *weights.values(), *flat[1:], activation="swiglu")
    return y_TD.detach().view_as(x_BSD)


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def _outputs(keys: Keys) -> list[tuple[float, float, float]]:
    """For each route the largest differences of this rank: between the dispatches their outputs and their gradients,
    and of the output to one without ranks."""
    found = []
    trainers = {name: start(keys | {"mesh.dispatch": name}) for name in ("all_gather", "all_to_all")}
    for route in ROUTES:
        results = []
        for trainer in trainers.values():
            moe, (x, gate, expert) = gathered(trainer), inputs(trainer, route)
            y = dispatched(moe, x, gate, expert)
            gradients = torch.autograd.grad(y.square().sum(), (x, gate))
            results.append((y.detach(), gradients))
        (gather, gather_gradients), (exchange, exchange_gradients) = results
        plain = by_hand(trainers["all_gather"], *inputs(trainers["all_gather"], route))
        unlike = max(apart(a, b) for a, b in zip(gather_gradients, exchange_gradients, strict=True))
        found.append((apart(gather, exchange), unlike, apart(plain, exchange)))
        assert exchange.abs().max() > 1e-4, "nothing was computed"
    return found


PLACED = [
    on("1x1x4"),
    on("2x1x2", mesh__experts="dp"),
    on("2x1x2", mesh__experts="dp_tp"),
    on("2x1x2", mesh__experts="dp_tp", training__seq_len=7) | WHOLE,
    on("1x1x4", training__seq_len=7) | WHOLE,
    on("2x1x2", mesh__experts="dp", training__seq_len=7) | WHOLE,
]


def _all_outputs() -> list[list[tuple[float, float, float]]]:
    return [_outputs(keys) for keys in PLACED]


def test_both_dispatches_compute_the_same() -> None:
    """Also where a rank gets no token, where copies are absent, and where tp does not divide the tokens it shares."""
    for rank in run_on_ranks(_all_outputs, 4, timeout=600):
        for keys, of_routes in zip(PLACED, rank, strict=True):
            for route, (outputs, gradients, plain) in zip(ROUTES, of_routes, strict=True):
                assert outputs < 1e-14, f"{keys}, {route}: outputs differ"
                assert gradients < 1e-14, f"{keys}, {route}: gradients differ"
                assert plain < 1e-14, f"{keys}, {route}: not what one place computes"


def _sent_rows(expert_TK: list[list[int]]) -> tuple[int, int]:
    """What the forward all-to-all of two tokens sends from each of two ranks: bytes, and rows that came."""
    trainer = start(on("2x1x1", mesh__experts="dp", mesh__dispatch="all_to_all", training__seq_len=2))
    moe, rows = gathered(trainer), []
    moe.experts.register_forward_pre_hook(lambda _module, args: rows.append(len(args[0])))
    expert_BSK = torch.tensor(expert_TK)[None]
    with BytesSent(trainer.mesh) as sent, torch.no_grad():
        dispatched(moe, torch.ones(1, 2, D).double(), torch.ones(1, 2, K).double(), expert_BSK)
    assert set(sent.by_collective()) == {("dp", "all_to_all")}
    return sent.by_axis()["dp"], rows[0]


@pytest.mark.parametrize(
    ("expert_TK", "others", "rows"),
    [
        # Four experts on each rank, the same two tokens on both; of rank 0 and 1: rows for the other, rows that come.
        ([[0, 1, 2], [-1, -1, -1]], (0, 1), (2, 0)),
        ([[-1, 5, -1], [-1, -1, 4]], (2, 0), (0, 4)),
        ([[0, 4, -1], [-1, -1, -1]], (1, 1), (2, 2)),
        ([[-1, -1, -1], [-1, -1, -1]], (0, 0), (0, 0)),
    ],
)
def test_absent_copies_are_not_sent(expert_TK: list[list[int]], others: tuple[int, int], rows: tuple[int, int]) -> None:
    """A row is a vector there, gates and ids there, and a vector back; counts take 16 bytes."""
    there, back = D * 8 + 2 * K * 8, D * 8
    for rank, (sent, came) in enumerate(run_on_ranks(_sent_rows, 2, expert_TK)):
        received_from_other = others[1 - rank]
        assert came == rows[rank]
        assert sent == 16 + others[rank] * there + received_from_other * back


def _no_tokens(keys: Keys, backend: str) -> list[bool]:
    """Whether the gradients of this rank's experts are all 0, when only the first two of all experts are chosen."""
    dtypes = FLOAT32 if backend == "torch" else {}
    trainer = start(keys | dtypes | {"moe.backend": backend, "moe.hidden_dim": 16})
    moe, (x, gate, expert) = gathered(trainer), inputs(trainer, "to one rank")
    dispatched(moe, x.to(moe.experts.w_up.dtype), gate, expert).square().sum().backward()
    gradients = [param.grad.to_local() for param in moe.experts.parameters()]
    assert all(gradient.isfinite().all() for gradient in gradients)
    return [not gradient.any() for gradient in gradients]


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("dispatch", ["all_gather", "all_to_all"])
def test_a_rank_without_tokens_has_a_gradient_of_zero(dispatch: str, backend: str) -> None:
    """The norm and the optimizer ask each parameter for one."""
    keys = on("2x1x2", mesh__experts="dp_tp", mesh__dispatch=dispatch)
    ranks = run_on_ranks(_no_tokens, 4, keys, backend, timeout=600)
    assert ranks == [[False, False], [True, True], [True, True], [True, True]]


def _step(keys: Keys) -> tuple[float, dict[str, Tensor]]:
    """Loss and this rank's gradients of one step."""
    trainer = start(keys)
    loss = trainer.runner.step(batch_of(trainer), torch.tensor(1.0))
    return loss.item(), {name: local(param.grad) for name, param in trainer.parts[0].named_parameters()}


def local(x: Tensor | None) -> Tensor:
    assert isinstance(x, DTensor)
    return x.to_local().clone()


def _exact_and_worst() -> list[bool]:
    found = []
    for place in ("tp", "dp", "dp_tp"):
        keys = on("2x1x2", mesh__experts=place, moe__backend="torch", moe__hidden_dim=16) | FLOAT32
        (loss, exact), (same_loss, worst) = (_step(keys | {"moe.rows": rows}) for rows in ("exact", "worst"))
        found.append(loss == same_loss and all(torch.equal(exact[name], worst[name]) for name in exact))
    return found


def test_room_for_the_worst_case_changes_no_bit() -> None:
    assert run_on_ranks(_exact_and_worst, 4, timeout=600) == [[True] * 3] * 4


def _accumulated(place: str) -> tuple[float, float]:
    """In bf16 with float32 masters: how far the experts' gradient of four microbatches is from the float32 sum of each
    microbatch's own, and from that of one big microbatch, relative to the largest element."""
    keys = on("2x1x1", mesh__experts=place, training__global_batch_size=8) | MIXED
    trainer, big = start(keys), start(keys | {"training.microbatch_size": 4})
    batch = batch_of(trainer)
    name, size = "layers.0.moe.experts.w_down", 4
    weight = dict(trainer.parts[0].named_parameters())[name]
    expected = torch.zeros_like(weight.to_local())
    for i in range(size):
        one = Batch(*(None if x is None else x[i : i + 1] for x in vars(batch).values()))
        trainer.runner.step(one, torch.tensor(1.0))
        assert weight.grad.dtype == torch.float32
        expected += local(weight.grad)
        trainer.optimizers.zero_grad()
    assert (expected != expected.bfloat16()).any(), "sums of bf16 numbers have more digits than one of them"
    gradients = []
    for each in (trainer, big):
        each.runner.step(batch, torch.tensor(1.0))
        gradients.append(local(dict(each.parts[0].named_parameters())[name].grad))
    accumulated, at_once = gradients
    largest = expected.abs().max()
    return float(apart(accumulated, expected) / largest), float(apart(accumulated, at_once) / largest)


@pytest.mark.parametrize("place", ["dp", "dp_tp"])
def test_gradients_outside_of_fsdp_accumulate_in_float32(place: str) -> None:
    for from_sum, from_one in run_on_ranks(_accumulated, 2, place, timeout=600):
        assert from_sum == 0
        assert 0 < from_one < 2**-7  # rounding of activations and products to bf16


def experts_of(trainer: Trainer) -> dict[str, tuple[Tensor, Tensor]]:
    """Master weights of this rank's experts, cast now, and the copies it computes with."""
    experts = trainer.parts[0].layers["0"].moe.experts
    return {
        name: (param.to_local().detach().bfloat16(), getattr(experts, f"{name}_copy"))
        for name, param in experts.named_parameters()
    }


def manager(trainer: Trainer, folder: Path) -> CheckpointManager:
    loader = Loader(trainer.config, build_corpus(trainer.config))
    state = (trainer.optimizers, trainer.schedule, loader, trainer.balance)
    return CheckpointManager(folder, trainer.config, list(trainer.parts), *state)


def _copies(folder: Path) -> list[bool]:
    """Whether copies are those of the weights: after a step's update, in the next forward, and after a load."""
    trainer = start(on("2x1x1", mesh__experts="dp", optimizer__lr=0.1) | MIXED)
    batch = batch_of(trainer)

    def fresh() -> bool:
        return all(torch.equal(cast, copy) for cast, copy in experts_of(trainer).values())

    train_step(trainer, batch)
    found = [fresh()]
    loss = evaluate(trainer, [batch])
    found.append(fresh())
    checkpoints = manager(trainer, folder)
    checkpoints.save(1)
    train_step(trainer, batch)
    assert evaluate(trainer, [batch]) != loss
    checkpoints.load(1)
    found.append(fresh())
    assert evaluate(trainer, [batch]) == loss
    return [*found, fresh()]


def test_copies_follow_the_weights(tmp_path: Path) -> None:
    """An update or a load leaves them as they were; the next use casts them anew."""
    assert run_on_ranks(_copies, 2, tmp_path, timeout=600) == [[False, True, False, True]] * 2


def _loaded_between_evaluations(folder: Path) -> tuple[float, float, float]:
    """Losses of one batch: after one step, after two, and with the first step's weights loaded again."""
    trainer = start(on("1x1x1", optimizer__lr=0.1) | MIXED)
    assert trainer.config.fsdp.reshard_after_forward == "never"
    batch, checkpoints, losses = batch_of(trainer), manager(trainer, folder), []
    for step in (1, 2):
        train_step(trainer, batch)
        checkpoints.save(step)
        losses.append(evaluate(trainer, [batch]).item())
    checkpoints.load(1)
    return losses[0], losses[1], evaluate(trainer, [batch]).item()


def test_weights_that_stay_gathered_follow_a_load(tmp_path: Path) -> None:
    """An evaluation has no backward pass that would free them; FSDP does when a state is loaded."""
    ((first, second, again),) = run_on_ranks(_loaded_between_evaluations, 1, tmp_path, timeout=600)
    assert again == first != second


def _whole(trainer: Trainer) -> dict[str, Tensor]:
    state = dict(trainer.parts[0].named_parameters()) | trainer.optimizers.state_dict()
    return {key: x.full_tensor().clone() if isinstance(x, DTensor) else x.clone() for key, x in state.items()}


def _save(keys: Keys, folder: Path) -> dict[str, Tensor]:
    trainer = start(keys)
    train_step(trainer, batch_of(trainer))
    manager(trainer, folder).save(1)
    return _whole(trainer)


def _load(keys: Keys, folder: Path) -> tuple[dict[str, Tensor], float]:
    trainer = start(keys | {"training.seed": 5})
    manager(trainer, folder).load(1)
    return _whole(trainer), train_step(trainer, batch_of(trainer)).loss.item()


SAVED_ON = on("2x1x2", mesh__experts="dp_tp")
LOADED_ON = [
    SAVED_ON,
    on("1x1x2"),
    on("4x1x1"),
    on("1x1x2", mesh__experts="tp_hidden"),
    on("2x1x2", mesh__experts="dp"),
]


@pytest.mark.parametrize(
    "dtypes", [pytest.param({}, marks=pytest.mark.full), MIXED], ids=["float64", "bfloat16 with float32 masters"]
)
def test_a_checkpoint_loads_under_any_placement(tmp_path: Path, dtypes: Keys) -> None:
    """Weights and moments of experts outside of FSDP, to the bit; no copy is part of a checkpoint."""
    saved = run_on_ranks(_save, 4, SAVED_ON | dtypes, tmp_path, timeout=600)[0]
    assert not any("copy" in key for key in saved)
    losses = []
    for keys in LOADED_ON:
        ranks = keys["mesh.dp"] * keys["mesh.tp"]
        loaded, loss = run_on_ranks(_load, ranks, keys | dtypes, tmp_path, timeout=600)[0]
        assert loaded.keys() == saved.keys()
        assert all(torch.equal(loaded[key], saved[key]) for key in saved), keys
        losses.append(loss)
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-2 if dtypes else 1e-12)
