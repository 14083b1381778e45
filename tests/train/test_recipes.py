"""The three recipes of docs/finetune.md, run with tiny models that transformers makes on the spot."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_dtensor.__main__ import main
from moe_dtensor.checkpoint.hugging_face.convert import config_only
from moe_dtensor.config.load import load
from moe_dtensor.config.resolve import resolve
from moe_dtensor.config.tables import all_fields, show
from moe_dtensor.verify.miniature import Layout, shrink
from tests.data.chat_templates import save_tokenizer
from tests.data.test_conversations import talks, write
from tests.train.starts import Start

SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "vocab_size": 416,
    "initializer_range": 0.1,
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MODELS = {
    "olmoe_1b_7b_continue": ("Olmoe", {"num_experts": 6, "num_experts_per_tok": 2}),
    "qwen3_30b_a3b_sft": ("Qwen3Moe", {**EXPERTS, "norm_topk_prob": True, "num_key_value_heads": 2, "head_dim": 16}),
    "qwen3_0_6b_upcycled": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True}),
}
SMALL = {
    "training.seq_len": "96",
    "training.global_batch_size": "4",
    "training.microbatch_size": "1",
    "training.param_dtype": "float32",
    "training.steps": "4",
    "training.validation_interval": "2",
    "training.routing_drift_interval": "2",
    "lr_scheduler.warmup_steps": "1",
    "compile.enable": "false",
    "mesh.tp": "2",
}


def save_model(recipe: str, folder: Path) -> Path:
    import transformers

    name, more = MODELS[recipe]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, **more)
    getattr(transformers, f"{name}ForCausalLM")(config).save_pretrained(folder)
    return save_tokenizer(folder, "chatml")


def sizes(recipe: Path, own: Path) -> list[str]:
    """Flags that give a recipe the sizes of another model of its class; all but numbers has to be the recipe's own."""
    mine, theirs = load(recipe), load(own)
    resolved = resolve(mine, 1), resolve(theirs, 1)
    words = []
    for key, field in all_fields().items():
        if field.table in ("model", "moe", "rope") and key not in ("moe.balance_loss", "moe.z_loss"):
            here, there = (getattr(getattr(config, field.table), field.name) for config in (mine, theirs))
            same = len({getattr(getattr(config, field.table), field.name) for config in resolved}) == 1
            if here != there and not same:
                assert isinstance(there, int | float), (key, here, there)
                words += [f"--{key}", show(there)]
    return words


@pytest.mark.parametrize("name", MODELS)
def test_a_recipe_can_be_proven(name: str) -> None:
    """A path and an export in the TOML were refused by verify, whose miniature reads and saves nothing."""
    config = load(Path("train_configs") / f"{name}.toml")
    small = shrink(config, [Layout(1, 1, 1), Layout(2, 1, 2)])
    assert small.data.document_mask == ("sft" in name)
    assert small.optimizer.router_lr == config.optimizer.router_lr


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.full) for name in MODELS])
def test_a_recipe_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    recipe = Path("train_configs") / f"{name}.toml"
    folder = save_model(name, tmp_path / "hf")
    if "upcycled" in name:
        [command] = re.findall(r"python -m moe_dtensor (convert .* --upcycle .*)", recipe.read_text())
        words = command.replace("Qwen3-0.6B", str(folder)).replace("qwen3_upcycled", str(tmp_path / "mixture")).split()
        assert main(words) == 0
        folder = tmp_path / "mixture"
        own = folder / "config.toml"
        assert "group_sequences" not in own.read_text()
        assert "validation_sequences" not in own.read_text()
    else:
        own = tmp_path / "own.toml"
        config_only(folder, own)
    if "sft" in name:
        path = write(tmp_path / "talks.jsonl", talks(500, 12))
    else:
        texts = [{"text": f"text number {i}: " + "words and words " * 12} for i in range(120)]
        path = write(tmp_path / "texts.jsonl", texts)
    words = ["train", "--config", str(recipe), "--run.folder", str(tmp_path / "run"), *sizes(recipe, own)]
    words += ["--checkpoint.initial", str(folder), "--data.tokenizer", str(folder), "--data.path", path]
    words += [word for key, value in SMALL.items() for word in (f"--{key}", value)]
    ended = Start(tmp_path, words, 2).wait(300)
    assert ended.statuses == [0, 0], ended.text
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["step"] == 4
    assert records[-1]["loss"] < records[0]["loss"]
    assert set(records[-1]["routing_drift"]) == {"0", "1"}
    assert ("trained_share" in records[-1]) == ("sft" in name)
    check_export(tmp_path / "run" / "hugging_face", records[-1])


def check_export(folder: Path, last: dict[str, Any]) -> None:
    """transformers loads what the run left, with its tokenizer and its template."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "1?"}], return_tensors="pt", return_dict=False)
    assert model(ids).logits.isfinite().all()
    assert 0 < last["validation_loss"] < 10
