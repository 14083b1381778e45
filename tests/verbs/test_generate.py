"""The verb ``generate`` on a Hugging Face folder: prompts, conversations, ranks; and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_dtensor.checkpoint.hugging_face.export import write_tokenizer
from tests.train.starts import Ended, Start

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MESSAGES = [{"role": "system", "content": "Brief."}, {"role": "user", "content": "Why?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import transformers

    folder = tmp_path_factory.mktemp("generate") / "hf"
    torch.manual_seed(1)
    config = transformers.Qwen3MoeConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=16,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        eos_token_id=256,
        bos_token_id=None,
        pad_token_id=None,
    )
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(folder)
    write_tokenizer("bytes", 257, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": TEMPLATE}))
    return folder


def start(folder: Path, *words: str, ranks: int = 1) -> Ended:
    argv = ["generate", "--checkpoint", str(folder), "--training.param_dtype", "float32", "--max-tokens", "6", *words]
    return Start(folder.parent, argv, ranks).wait()


def completions(folder: Path, lines: list[dict[str, Any]], *words: str, ranks: int = 1) -> list[str]:
    file = folder.parent / "prompts.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    ended = start(folder, "--prompts", str(file), *words, ranks=ranks)
    assert ended.statuses == [0] * ranks, ended.text
    return [json.loads(line)["completion"] for line in ended.text.splitlines() if line.startswith("{")]


def test_a_conversation_is_its_text_by_the_template(folder: Path) -> None:
    """``--chat`` gives what the rendered text gives as a plain prompt; a prompt is what a user says."""
    end = "<|end|>"
    said = f"<system>Brief.{end}<user>Why?{end}<assistant>"
    alone = f"<user>Why?{end}<assistant>"
    chat = completions(folder, [{"messages": MESSAGES}, {"prompt": "Why?"}], "--chat")
    assert chat == completions(folder, [{"prompt": said}, {"prompt": alone}])
    assert chat[0] != chat[1]


def test_one_prompt_streams_and_ranks_speak_once(folder: Path) -> None:
    (expected,) = completions(folder, [{"prompt": "routes"}])
    ended = start(folder, "--prompt", "routes", "--check", "--mesh.tp", "2", ranks=2)
    assert ended.statuses == [0, 0], ended.text
    assert expected in ended.text
    assert ended.text.count("check: logits are those") == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--prompt", "a", "--mesh.pp", "2"), "have no pipeline"),
        (("--prompt", "a", "--top-p", "0"), "--top-p 0.0 makes no sense"),
        (("--prompt", "a", "--temperature", "nan"), "--temperature nan makes no sense"),
        (("--prompt", "a" * 64), "prompt 1 has 64 tokens, and the model was made for 64 positions"),
        (("--prompts", "/no/such.jsonl"), "cannot be read"),
        ((), "one of the arguments --prompt --prompts is required"),
    ],
)
def test_what_is_wrong_is_told(folder: Path, words: tuple[str, ...], told: str) -> None:
    ended = start(folder, *words)
    assert ended.statuses == [2]
    assert told in ended.text
    assert len(ended.errors) == 1


def test_chat_without_a_template_is_refused(folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in folder.iterdir():
        if file.name != "tokenizer_config.json":
            (bare / file.name).symlink_to(file)
    (bare / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    ended = start(bare, "--prompt", "a", "--chat")
    assert ended.statuses == [2]
    assert "has no chat template" in ended.text
