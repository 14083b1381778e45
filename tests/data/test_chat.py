"""Chat templates: the text is transformers', and what the assistant says is found whatever the template."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_dtensor.config.errors import ConfigError
from moe_dtensor.data.chat import ChatTemplate, ConversationError, load_chat_template
from tests.data.chat_templates import SPECIAL, TEMPLATES

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How old is the sun?"},
    {"role": "assistant", "content": "<think>\nAstronomy.\n</think>\n\nSome 4.6 billion years."},
    {"role": "user", "content": "And the moon?"},
    {"role": "assistant", "content": "About the same."},
]
SAID = {
    "chatml": ["<think>\nAstronomy.\n</think>\n\nSome 4.6 billion years.<|im_end|>", "About the same.<|im_end|>"],
    "instructions": [" <think>\nAstronomy.\n</think>\n\nSome 4.6 billion years.</s>", " About the same.</s>"],
    "thinking": ["Some 4.6 billion years.<|im_end|>", "<think>\n\n</think>\n\nAbout the same.<|im_end|>"],
    "tagged": ["<think>\nAstronomy.\n</think>\n\nSome 4.6 billion years.</s>\n", "About the same.</s>"],
    "plain": ["<think>\nAstronomy.\n</think>\n\nSome 4.6 billion years.</s>", "About the same.</s>"],
}


def template(name: str) -> ChatTemplate:
    return ChatTemplate(TEMPLATES[name], {"bos_token": "<s>", "eos_token": "</s>"}, SPECIAL)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_is_that_of_transformers(name: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    for prompt in (False, True):
        [theirs], _ = render_jinja_template(
            [TALK], chat_template=TEMPLATES[name], add_generation_prompt=prompt, bos_token="<s>", eos_token="</s>"
        )
        assert template(name).render(TALK, add_generation_prompt=prompt) == theirs


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_the_assistant_says_is_found(name: str) -> None:
    text, spans = template(name).assistant_spans(TALK)
    assert text == template(name).render(TALK)
    assert [text[start:end] for start, end in spans] == SAID[name]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_prompts_own_turns_do_not_count(name: str) -> None:
    text, spans = template(name).assistant_spans(TALK, first=4)
    assert [text[start:end] for start, end in spans] == SAID[name][1:]


def test_tags_mark_what_transformers_marks() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    [text], [spans] = render_jinja_template(
        [TALK],
        chat_template=TEMPLATES["tagged"],
        return_assistant_tokens_mask=True,
        bos_token="<s>",
        eos_token="</s>",
    )
    assert template("tagged").assistant_spans(TALK) == (text, spans)


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "instructions"])
def test_odd_turns(name: str) -> None:
    """Two of the assistant's in a row, one without words, content like what is around it."""
    odd = [
        {"role": "user", "content": "assistant"},
        {"role": "assistant", "content": ""},
        {"role": "assistant", "content": "assistant\n<think>"},
        {"role": "user", "content": "again"},
        {"role": "assistant", "content": "again"},
    ]
    text, spans = template(name).assistant_spans(odd)
    said = [text[start:end] for start, end in spans]
    for turn, content in zip(said, ("", "assistant\n<think>", "again"), strict=True):
        for extra in (*SPECIAL, "<think>\n\n</think>\n\n"):
            turn = turn.replace(extra, "")
        assert turn.strip("\n") == content


def test_roles_that_a_template_refuses_are_told() -> None:
    with pytest.raises(ConversationError, match="roles must alternate"):
        template("instructions").assistant_spans([{"role": "assistant", "content": "first"}])
    with pytest.raises(ConversationError, match="no user query"):
        template("thinking").render([{"role": "system", "content": "x"}])


def test_where_a_template_comes_from(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {}, "added_tokens": []}))
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    with pytest.raises(ConfigError, match="has no chat template"):
        load_chat_template(tmp_path)
    with pytest.raises(ConfigError, match="bytes' has no chat template"):
        load_chat_template("bytes")
    several = [{"name": "tools", "template": "no"}, {"name": "default", "template": "{{ eos_token }}d"}]
    settings.write_text(json.dumps({"eos_token": {"content": "</s>"}, "chat_template": several}))
    assert load_chat_template(tmp_path / "tokenizer.json").render([]) == "</s>d"
    (tmp_path / "chat_template.jinja").write_text("own")
    assert load_chat_template(tmp_path).render([]) == "own"
    other = tmp_path / "other.jinja"
    other.write_text("{{ messages[0]['content'] }}")
    assert load_chat_template("bytes", str(other)).render([{"content": "<b>"}]) == "<b>"
    with pytest.raises(ConfigError, match=r"none\.jinja' cannot be read"):
        load_chat_template(tmp_path, str(tmp_path / "none.jinja"))
    other.write_text("{% for %}")
    with pytest.raises(ConfigError, match="not valid"):
        load_chat_template(tmp_path, str(other))
