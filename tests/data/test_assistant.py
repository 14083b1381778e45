"""What the assistant says is found whatever the template."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_dtensor.data.chat import ChatTemplate, ConversationError
from moe_dtensor.data.conversations import assistant_spans
from tests.data.chat_templates import SPECIAL, TEMPLATES

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How old is the sun?"},
    {"role": "assistant", "content": "<think>\nAstronomy.\n</think>\n\nSome 4.6 billion years."},
    {"role": "user", "content": "And the moon?"},
    {"role": "assistant", "content": "About the same."},
]
YEARS = "<think>\nAstronomy.\n</think>\n\nSome 4.6 billion years."
FINAL = "<|channel|>final<|message|>"
SAID = {
    "chatml": [f"{YEARS}<|im_end|>", "About the same.<|im_end|>"],
    "instructions": [f" {YEARS}</s>", " About the same.</s>"],
    "thinking": ["Some 4.6 billion years.<|im_end|>", "<think>\n\n</think>\n\nAbout the same.<|im_end|>"],
    "tagged": [f"{YEARS}</s>\n", "About the same.</s>"],
    "late": [f" {YEARS}</s>", " About the same.</s>"],
    "channels": [f"{FINAL}{YEARS}<|end|>", f"{FINAL}About the same.<|return|>"],
    "plain": [f"{YEARS}</s>", "About the same.</s>"],
}


@pytest.fixture
def template(tmp_path: Path) -> Callable[[str], ChatTemplate]:
    added = [{"content": token, "special": True} for token in SPECIAL]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {}, "added_tokens": added}))
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}

    def load(name: str) -> ChatTemplate:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": TEMPLATES[name]}))
        return ChatTemplate(tmp_path)

    return load


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_the_assistant_says_is_found(name: str, template) -> None:
    text, spans = assistant_spans(template(name), TALK)
    assert text == template(name).render(TALK, False)
    assert [text[start:end] for start, end in spans] == SAID[name]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompts_own_turns_do_not_count(name: str, template) -> None:
    text, spans = assistant_spans(template(name), TALK, first=4)
    assert [text[start:end] for start, end in spans] == SAID[name][1:]


def test_tags_mark_what_transformers_marks(template) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    [text], [spans] = render_jinja_template(
        [TALK],
        chat_template=TEMPLATES["tagged"],
        return_assistant_tokens_mask=True,
        bos_token="<s>",
        eos_token="</s>",
    )
    assert assistant_spans(template("tagged"), TALK) == (text, spans)


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name not in ("instructions", "late")])
def test_odd_turns(name: str, template) -> None:
    """Two of the assistant's in a row, one without words, content like what is around it."""
    odd = [
        {"role": "user", "content": "assistant"},
        {"role": "assistant", "content": ""},
        {"role": "assistant", "content": "assistant\n<think>"},
        {"role": "user", "content": "again"},
        {"role": "assistant", "content": "again"},
    ]
    text, spans = assistant_spans(template(name), odd)
    said = [text[start:end] for start, end in spans]
    for turn, content in zip(said, ("", "assistant\n<think>", "again"), strict=True):
        for extra in (FINAL, *SPECIAL, "<think>\n\n</think>\n\n"):
            turn = turn.replace(extra, "")
        assert turn.strip("\n") == content


def test_roles_that_a_template_refuses_are_told(template) -> None:
    with pytest.raises(ConversationError, match="roles must alternate"):
        assistant_spans(template("instructions"), [{"role": "assistant", "content": "first"}])
    with pytest.raises(ConversationError, match="no user query"):
        template("thinking").render([{"role": "system", "content": "x"}])
