"""Derived values: stages, MoE blocks, padding, batches."""

from __future__ import annotations

import pytest

from moe_dtensor.config.check import check
from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.load import override
from moe_dtensor.config.resolve import (
    attends_by_sequence,
    expert_takes,
    microbatches,
    moe_layers,
    num_stages,
    padded_vocab,
    rank_stages,
    resolve,
    routes_by_sequence,
    stage_layers,
)
from moe_dtensor.config.schema import Config

SCHEDULES = ("GPipe", "1F1B", "Interleaved1F1B", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")


def test_derived_fields() -> None:
    config = resolve(override(Config(), {"mesh.pp": 2, "mesh.tp": 2}), 8)
    assert config.mesh.dp == 2
    assert config.model.num_kv_heads == 8
    assert config.model.head_dim == 32
    assert config.model.hidden_dim == 704  # 8/3 of 256 is 682.7
    assert config.moe.group_sequences == 2
    assert config.fsdp.reshard_after_forward == "never"
    assert config.training.validation_sequences == 24
    assert microbatches(config) == 6


@pytest.mark.parametrize(
    ("keys", "world", "expected"),
    [
        ({}, 1, "never"),
        ({"mesh.tp": 2}, 2, "never"),
        ({}, 2, "always"),
        ({"fsdp.cpu_offload": True}, 1, "always"),
        ({"fsdp.reshard_after_forward": "always"}, 1, "always"),
        ({"mesh.pp": 2}, 4, "never"),
    ],
)
def test_gathered_weights_stay_where_nothing_is_gained_by_freeing_them(
    keys: dict[str, object], world: int, expected: str
) -> None:
    assert resolve(override(Config(), keys), world).fsdp.reshard_after_forward == expected


def test_plain_activation_has_four_times_the_width() -> None:
    assert resolve(override(Config(), {"model.activation": "gelu"}), 1).model.hidden_dim == 1024


def test_moe_layers() -> None:
    assert moe_layers(Config()) == frozenset(range(6))
    assert moe_layers(override(Config(), {"moe.every": 2})) == {1, 3, 5}
    assert moe_layers(override(Config(), {"moe.layers": (0, 5), "moe.every": 2})) == {0, 5}
    dense = override(Config(), {"moe.num_experts": 0})
    assert moe_layers(dense) == frozenset()
    check(dense, 1)


@pytest.mark.parametrize(("vocab", "padded"), [(64, 64), (65, 128), (257, 320), (50304, 50304)])
def test_padded_vocab(vocab: int, padded: int) -> None:
    assert padded_vocab(override(Config(), {"model.vocab_size": vocab})) == padded


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("pp", [1, 2, 3, 4])
@pytest.mark.parametrize("layers", [8, 9, 13])
def test_every_block_is_on_one_stage_and_every_stage_on_one_rank(schedule: str, pp: int, layers: int) -> None:
    keys = {"pipeline.schedule": schedule, "mesh.pp": pp, "model.num_layers": layers}
    config = resolve(override(Config(), keys), pp)
    stages = [stage for rank in range(pp) for stage in rank_stages(config, rank)]
    assert sorted(stages) == list(range(num_stages(config)))
    blocks = [block for stage in range(num_stages(config)) for block in stage_layers(config, stage)]
    assert blocks == list(range(layers))
    sizes = [len(stage_layers(config, stage)) for stage in range(num_stages(config))]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("pp", [2, 3, 4])
def test_microbatch_rule_is_torchs_own(schedule: str, pp: int) -> None:
    """The check refuses exactly the numbers of microbatches that torch's schedule refuses."""
    from types import SimpleNamespace

    from torch.distributed.pipelining.schedules import get_schedule_class

    for count in range(1, 20):
        keys = {"mesh.pp": pp, "pipeline.schedule": schedule, "model.num_layers": 8}
        keys |= {"training.microbatch_size": 1, "training.global_batch_size": count}
        config = resolve(override(Config(), keys), pp)
        stages = [
            SimpleNamespace(
                group_size=pp,
                group_rank=0,
                num_stages=num_stages(config),
                stage_index=s,
                is_last=False,
                submod=SimpleNamespace(),
                has_backward=True,
                group=None,
                device="cpu",
                is_first=s == 0,
            )
            for s in rank_stages(config, 0)
        ]
        schedule_class = get_schedule_class(schedule)
        given = stages if len(stages) > 1 else stages[0]
        try:
            schedule_class(given, n_microbatches=count, loss_fn=lambda x: x)
            torch_takes_it = True
        except ValueError:
            torch_takes_it = False
        try:
            check(config, pp)
            check_takes_it = True
        except ConfigError:
            check_takes_it = False
        assert check_takes_it == torch_takes_it, count


@pytest.mark.parametrize(
    ("keys", "size", "top_k", "takes"),
    [
        ({}, 10, 2, None),
        # Rounded up, and no more than there are.
        ({"moe.router": "expert_choice"}, 10, 1, 2),
        ({"moe.router": "expert_choice"}, 3, 8, 3),
        ({"moe.router": "expert_choice"}, 1, 1, 1),
        # A factor is meant as it is written: in binary 1.1 times 400 is above 440.
        ({"moe.capacity_factor": 1.1}, 200, 2, 55),
        ({"moe.capacity_factor": 1.25}, 8, 2, 3),
        ({"moe.capacity_factor": 0.01}, 8, 1, 1),
    ],
)
def test_copies_that_an_expert_takes_of_a_group(keys: dict, size: int, top_k: int, takes: int | None) -> None:
    sizes = {"moe.num_experts": 8, "moe.top_k": top_k, "moe.group_sequences": 1, "training.seq_len": size}
    assert expert_takes(override(Config(), sizes | keys)) == takes


@pytest.mark.parametrize(
    ("keys", "attends", "routes"),
    [
        ({}, False, False),  # the group is the microbatch, which two ranks divide
        ({"moe.group_sequences": 2}, False, True),
        ({"moe.group_sequences": 4, "mesh.attention": "sequences"}, True, False),
        ({"moe.group_sequences": 1, "mesh.attention": "sequences"}, True, True),
        ({"moe.group_sequences": 1, "mesh.attention": "sequences", "mesh.tp": 1}, False, False),
        ({"moe.group_sequences": 1, "mesh.sequence_parallel": False}, False, False),
        ({"moe.group_sequences": 1, "training.microbatch_size": 3}, False, False),
    ],
)
def test_what_tp_ranks_do_for_their_own_sequences(keys: dict, attends: bool, routes: bool) -> None:
    config = resolve(override(Config(), {"mesh.tp": 2, "training.microbatch_size": 4} | keys), 2)
    assert (attends_by_sequence(config), routes_by_sequence(config)) == (attends, routes)
