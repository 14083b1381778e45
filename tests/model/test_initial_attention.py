"""Initial values of attention's own parameters."""

from __future__ import annotations

import torch

from moe_dtensor.config.build import override
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
