"""Initial values of parameters that are no matrices."""

from __future__ import annotations

import torch

from moe_dtensor.config.load import override
from moe_dtensor.config.resolve import resolve
from moe_dtensor.config.schema import Config
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
