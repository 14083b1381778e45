"""A published dense model upcycled: the mixture gives the logits that transformers gives for the dense one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moe_dtensor.__main__ import main
from moe_dtensor.checkpoint.native import NativeWeights, find_native
from moe_dtensor.config.load import load
from moe_dtensor.config.resolve import resolve
from moe_dtensor.model.transformer import Transformer
from tests.checkpoint.hugging_face import tiny_models


@pytest.mark.parametrize(("case", "split"), [("qwen3", 1), ("llama", 2)])
def test_the_mixture_is_the_published_dense_model(
    case: str, split: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import transformers

    folder = tiny_models.save_model(case, tmp_path / "dense")
    words = ["convert", "--from", "hf", "--to", "native", "--input", str(folder), "--output", f"{tmp_path}/mixture"]
    more = ["--upcycle", "8", "--upcycle-split", str(split), "--upcycle-top-k", str(2 * split)]
    assert main(words + more) == 0
    assert "in 3 blocks; the dense model: what a block gives differs by" in capsys.readouterr().out
    config = resolve(load(tmp_path / "mixture" / "config.toml"), 1)
    assert config.moe.num_experts == 8
    weights = NativeWeights(find_native(tmp_path / "mixture").checkpoint)
    model = Transformer(config, range(config.model.num_layers)).eval()
    model.load_state_dict({name: weights.read(name).float() for name in weights.names()})
    tokens = torch.randint(0, 131, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        dense = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
        ours = model(tokens)
        assert float((ours - dense).abs().max() / dense.abs().max()) < 5e-6
        if split == 1:  # and back, as a mixture that transformers knows
            words = ["convert", "--from", "native", "--to", "hf", "--dtype", "float32"]
            assert main([*words, "--input", f"{tmp_path}/mixture", "--output", f"{tmp_path}/hf"]) == 0
            back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
            assert type(back).__name__ == "Qwen3MoeForCausalLM"
            assert float((back(tokens).logits - dense).abs().max() / dense.abs().max()) < 5e-6
