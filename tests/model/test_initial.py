"""Initial values of parameters that are no matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_dtensor.config.load import override
from moe_dtensor.config.resolve import resolve
from moe_dtensor.config.schema import Config
from moe_dtensor.model import initial
from moe_dtensor.model.initial import init_weights
from moe_dtensor.model.transformer import Transformer
from moe_dtensor.train.optimizer import is_decayed


def test_biases_and_sinks_start_at_0_norms_at_1_and_none_decays() -> None:
    changes = {"model.attention_bias": "all", "model.sinks": True, "model.qk_norm": "head_after_rope"}
    config = resolve(override(Config(), {"model.vocab_size": 64, "model.num_layers": 1, **changes}), 1)
    with torch.device("meta"):
        model = Transformer(config, range(1))
    model.to_empty(device="cpu")
    init_weights(model, config)
    attention = {name.split("attention.")[1]: p for name, p in model.named_parameters() if "attention." in name}
    for name in ("wq.bias", "wk.bias", "wv.bias", "output_bias", "sinks"):
        assert not attention[name].any(), name
        assert not is_decayed(f"layers.0.attention.{name}", attention[name])
    assert (attention["q_norm.weight"] == 1).all()
    assert attention["wq.weight"].std() > 0
    assert is_decayed("layers.0.attention.wq.weight", attention["wq.weight"])


def test_biases_of_norms_feed_forward_and_head_start_at_0_and_none_decays() -> None:
    changes = {"model.norm": "layernorm", "model.norm_bias": True, "model.ffn_bias": True, "model.head_bias": True}
    changes |= {"model.vocab_size": 64, "model.num_layers": 1, "moe.num_experts": 0}
    config = resolve(override(Config(), changes), 1)
    model = Transformer(config, range(1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    init_weights(model, config)
    biases = {name: p for name, p in model.named_parameters() if name.endswith("bias")}
    ffn = {f"layers.0.feed_forward.{name}" for name in ("gate.bias", "up.bias", "output_bias")}
    norms = {f"layers.0.{name}.bias" for name in ("attention_norm", "ffn_norm")}
    assert set(biases) == ffn | norms | {"norm.bias", "output.bias"}
    for name, parameter in biases.items():
        assert not parameter.any(), name
        assert not is_decayed(name, parameter)
    assert (model.norm.weight == 1).all()


def test_a_large_tensor_is_drawn_in_blocks_of_rows_and_only_where_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initial, "LARGE", 100)
    monkeypatch.setattr(initial, "BLOCK", 24)
    drawn: list[tuple[int, ...]] = []
    normal = initial._normal

    def count(shape: tuple[int, ...], *rest: object) -> Tensor:
        drawn.append(shape)
        return normal(shape, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(initial, "_normal", count)

    def held(rows: slice, columns: slice) -> Tensor:
        drawn.clear()
        local = torch.empty(rows.stop - rows.start, columns.stop - columns.start)
        initial._fill_normal(local, (rows, columns), (18, 6), 1.0, "seed/tok_embeddings.weight")
        return local

    whole = held(slice(0, 18), slice(0, 6))
    assert drawn == [(4, 6)] * 4 + [(2, 6)]
    assert whole.unique().numel() == whole.numel()
    assert 0.7 < whole.std() < 1.3
    assert torch.equal(held(slice(5, 17), slice(2, 5)), whole[5:17, 2:5])
    assert drawn == [(4, 6)] * 3 + [(2, 6)]
    assert torch.equal(held(slice(9, 10), slice(0, 6)), whole[9:10])
    assert drawn == [(4, 6)]
