"""Fine-tuning of an imported model: gradients are those of a plain masked loss in transformers, what is frozen stays as
it is to the bit, all else moves, and the drift of routing is measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dtensor.checkpoint.hugging_face.convert import config_only
from moe_dtensor.checkpoint.hugging_face.source import HuggingFaceSource, whole
from moe_dtensor.config.load import load, override
from moe_dtensor.config.resolve import resolve
from moe_dtensor.config.schema import Config
from moe_dtensor.data import Loader, build_corpus
from moe_dtensor.data.loader import IGNORED, Batch
from moe_dtensor.testing.ranks import run_on_ranks
from moe_dtensor.train.build import build
from moe_dtensor.train.checkpoints import load_initial
from moe_dtensor.train.routing import RoutingDrift
from moe_dtensor.train.step import count_targets, evaluate, read_batch, train_step
from tests.data.chat_templates import save_tokenizer
from tests.data.test_conversations import talks, write
from tests.train.starts import Start

MESHES = [(1, 1, 1, "tp"), pytest.param((2, 1, 2, "dp"), marks=pytest.mark.full)]


def save_qwen3_moe(folder: Path) -> Path:
    """A random tiny Qwen3-MoE of transformers with a tokenizer and a chat template."""
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        moe_intermediate_size=24,
        num_experts=6,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        vocab_size=416,
        initializer_range=0.1,
    )
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(folder)
    return save_tokenizer(folder, "thinking")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_qwen3_moe(tmp_path_factory.mktemp("models") / "qwen3")


@pytest.fixture
def config(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """What ``convert --config-only`` writes, with conversations."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config_only(model, tmp_path / "own.toml")
    keys = {
        "run.folder": str(tmp_path / "run"),
        "data.corpus": "conversations",
        "data.path": write(tmp_path / "talks.jsonl", talks(80, 12)),
        "training.seq_len": 96,
        "training.global_batch_size": 4,
        "training.microbatch_size": 1,
        "training.param_dtype": "float32",
        "training.steps": 4,
        "optimizer.lr": 1e-3,
        "lr_scheduler.warmup_steps": 1,
    }
    return override(load(tmp_path / "own.toml"), keys)


def placed(config: Config, mesh: tuple[int, int, int, str]) -> Config:
    dp, pp, tp, experts = mesh
    keys = {"mesh.dp": dp, "mesh.pp": pp, "mesh.tp": tp, "mesh.experts": experts}
    return resolve(override(config, keys), dp * pp * tp)


def start(config: Config) -> tuple[Any, Loader]:
    trainer = build(config, torch.device("cpu"))
    load_initial(trainer, config)
    return trainer, Loader(config, build_corpus(config))


def loss_and_gradients(config: Config) -> tuple[float, dict[str, Tensor]]:
    trainer, loader = start(config)
    batch = read_batch(trainer, loader)
    scale = 1.0 / count_targets(trainer, batch)
    loss = trainer.runner.step(batch, scale).double()
    if trainer.mesh["tp"].get_local_rank() > 0:
        loss.zero_()
    torch.distributed.all_reduce(loss)
    parameters = [named for part in trainer.parts for named in part.named_parameters()]
    return float(loss), {name: param.grad.full_tensor() for name, param in parameters}


def in_transformers(model: Path, batch: Batch, folder: Path) -> tuple[float, dict[str, Tensor]]:
    """Each conversation by itself through the class of transformers; the mean over the batch's trained tokens."""
    import transformers

    theirs = transformers.Qwen3MoeForCausalLM.from_pretrained(model, dtype=torch.float32)
    total = torch.zeros((), dtype=torch.float64)
    for ids_S, labels_S, documents_S in zip(batch.tokens_BS, batch.labels_BS, batch.documents_BS, strict=True):
        for number in documents_S.unique():
            inside = documents_S == number
            logits = theirs(ids_S[inside][None]).logits[0]
            total = total + torch.nn.functional.cross_entropy(
                logits, labels_S[inside], ignore_index=IGNORED, reduction="sum"
            )
    loss = total / (batch.labels_BS != IGNORED).sum()
    loss.backward()
    with torch.no_grad():
        for param in theirs.parameters():
            param.copy_(param.grad)
    theirs.save_pretrained(folder)  # by the names that files give them
    source = HuggingFaceSource(folder)
    found = {name: torch.empty(shape) for name, shape in source.shapes.items()}
    for name, out in found.items():
        source.read(name, whole(out.shape), out)
    return float(loss.detach()), found


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_gradients_are_those_of_a_plain_masked_loss(mesh: Any, config: Config, model: Path, tmp_path: Path) -> None:
    batch = Loader(config, build_corpus(config)).next_batch(0, 4)
    trained = (batch.labels_BS != IGNORED).double().mean()
    assert 0.1 < trained < 0.8
    assert batch.documents_BS.max() > 1
    expected_loss, expected = in_transformers(model, batch, tmp_path / "gradients")
    dp, pp, tp, _ = mesh
    for loss, found in run_on_ranks(loss_and_gradients, dp * pp * tp, placed(config, mesh)):
        assert loss == pytest.approx(expected_loss, rel=2e-5)
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            error = (gradient - expected[name]).abs().max() / expected[name].abs().max()
            assert error < 2e-5, (name, float(error))


def two_steps(config: Config) -> tuple[dict[str, Tensor], dict[str, Tensor], list[float], list[float]]:
    """Parameters before and after, norms as measured and without the routers. Shares of tokens are checked on the way,
    and that routing moves with the weights and not without."""
    trainer, loader = start(config)
    drift = RoutingDrift(trainer, loader)
    assert drift.measure(trainer).eq(0).all()
    evaluate(trainer, [read_batch(trainer, Loader(config, loader.corpus))])
    parameters = [named for part in trainer.parts for named in part.named_parameters()]
    before = {name: param.full_tensor().detach().clone() for name, param in parameters}
    norms, without = [], []
    for _ in range(2):
        before_it = loader.state_dict()
        batch = loader.next_batch(0, loader.batch_size)
        loader.load_state_dict(before_it)
        result = train_step(trainer, read_batch(trainer, loader))
        trained, padding = (batch.labels_BS != IGNORED).sum(), batch.padding_B.sum()
        shares = {"trained_share": float(trained / batch.labels_BS.numel()), "padding_share": float(padding / 384)}
        assert {name: float(share) for name, share in result.token_shares.items()} == pytest.approx(shares)
        norms.append(float(result.grad_norm))
        kept = [param.grad.full_tensor() for name, param in parameters if ".router." not in name]
        clipped = torch.stack([grad.norm() for grad in kept]).norm()
        without.append(float(clipped / min(1.0, config.training.max_grad_norm / (norms[-1] + 1e-6))))
    assert drift.measure(trainer).gt(0).all()
    return before, {name: param.full_tensor().detach() for name, param in parameters}, norms, without


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_a_frozen_router_stays_to_the_bit_and_all_else_moves(mesh: Any, config: Config) -> None:
    dp, pp, tp, _ = mesh
    frozen = placed(override(config, {"optimizer.router_lr": 0.0}), mesh)
    for before, after, norms, without in run_on_ranks(two_steps, dp * pp * tp, frozen):
        for name, value in after.items():
            assert torch.equal(value, before[name]) == (".router." in name), name
        assert norms == pytest.approx(without, rel=1e-5)
    slow = placed(override(config, {"optimizer.router_lr": 0.01}), mesh)
    for before, after, norms, without in run_on_ranks(two_steps, dp * pp * tp, slow):
        moved = {name: float((value - before[name]).abs().max()) for name, value in after.items()}
        routers = [x for name, x in moved.items() if ".router." in name]
        # Adam's first steps are as long as the rate, whatever the gradient.
        assert 0 < max(routers) < 3e-5 < 1e-3 < min(x for name, x in moved.items() if ".experts." in name)
        assert all(norm > other * (1 + 1e-6) for norm, other in zip(norms, without, strict=True))


def test_imported_configs_balance_nothing(config: Config) -> None:
    assert (config.moe.balance_loss, config.moe.z_loss, config.moe.bias_rate) == (0, 0, 0)


def drifts(folder: Path) -> dict[int, dict[str, float]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["routing_drift"] for line in lines if "routing_drift" in line}


def command(config: Config, folder: Path, **changes: Any) -> list[str]:
    from moe_dtensor.config.load import dump_changes

    folder.parent.mkdir(exist_ok=True, parents=True)
    file = folder.parent / f"{folder.name}.toml"
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    file.write_text(dump_changes(override(replace(config), {**changes, "run.folder": str(folder)})))
    return ["train", "--config", str(file)]


@pytest.mark.full
def test_drift_of_routing_counts_from_the_start_through_a_resume_on_another_mesh(
    config: Config, tmp_path: Path
) -> None:
    config = override(
        config,
        {
            "training.routing_drift_interval": 1,
            "lr_scheduler.decay": "constant",
            "checkpoint.interval": 2,
            "optimizer.lr": 3e-3,
        },
    )

    def run(folder: Path, ranks: int = 1, **changes: Any) -> dict[int, dict[str, float]]:
        ended = Start(tmp_path, command(config, folder, **changes), ranks).wait(200)
        assert ended.statuses == [0] * ranks, ended.text
        assert "trained " in ended.text
        return drifts(folder)

    whole_run = run(tmp_path / "whole")
    assert list(whole_run) == [1, 2, 3, 4]
    assert min(whole_run[1].values()) > 0
    assert max(whole_run[4].values()) < 1
    assert sum(whole_run[4].values()) > sum(whole_run[1].values())
    run(tmp_path / "parts", training__steps=2)
    assert run(tmp_path / "parts", 2, mesh__tp=2) == whole_run
