"""Chat templates are rendered as transformers renders them."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import pytest

from moe_dtensor.config.errors import ConfigError
from moe_dtensor.data.chat import ChatTemplate

CHATML = (
    "{%- for message in messages %}\n"
    "    {%- if message.role not in ['system', 'user', 'assistant'] -%}\n"
    "{{ raise_exception('unknown role') }}{% endif %}\n"
    "    {%- if message.role == 'skip' %}{% continue %}{% endif %}\n"
    "{{ '<|im_start|>' + message.role + '\\n' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}"
    "{% else %}{{ message.content }}{% endif %}{{ '<|im_end|>\\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
INSTRUCT = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'].strip() }}{{ eos_token }}{% endif %}{% endfor %}"
)
HEADERS = (
    "{% set ns = namespace(first=true) %}{% for m in messages %}"
    "{{ '<h>' ~ m.role ~ '</h>' }}{{ m.content | tojson if m.content is mapping else m.content | trim }}<eot>"
    "{% set ns.first = false %}{% endfor %}{% if add_generation_prompt %}<h>assistant</h>{% endif %}"
)
MESSAGES = [
    {"role": "system", "content": "Short answers."},
    {"role": "user", "content": "Où est <b>la gare</b>?  "},
    {"role": "assistant", "content": " Là-bas. "},
    {"role": "user", "content": "Merci"},
]


@pytest.mark.parametrize("template", [CHATML, INSTRUCT, HEADERS])
@pytest.mark.parametrize("generation_prompt", [True, False])
def test_three_templates_as_transformers_renders_them(tmp_path: Path, template: str, generation_prompt: bool) -> None:
    from tokenizers import Tokenizer, models
    from transformers import AutoTokenizer

    library = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "?": 2}, unk_token="?"))
    library.save(str(tmp_path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": {"__type": "AddedToken", "content": "<s>"},
        "eos_token": "</s>",
        "pad_token": None,
        "chat_template": template,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    expected = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=generation_prompt)
    assert ChatTemplate(tmp_path).render(MESSAGES, generation_prompt) == expected
    assert "gare" in expected


def test_what_is_no_template_or_no_message_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no chat template"):
        ChatTemplate(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}")
    with pytest.raises(ConfigError, match="is broken"):
        ChatTemplate(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    with pytest.raises(ConfigError, match="unknown role"):
        ChatTemplate(tmp_path).render([{"role": "tool", "content": ""}])
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content + 1 }}")
    with pytest.raises(ConfigError, match="refuses the messages"):
        ChatTemplate(tmp_path).render(MESSAGES)


def test_where_a_template_comes_from(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tokenizer of bytes has no chat template"):
        ChatTemplate(None)
    several = [{"name": "tools", "template": "no"}, {"name": "default", "template": "{{ eos_token }}d"}]
    settings = {"eos_token": {"content": "</s>"}, "chat_template": several}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert ChatTemplate(tmp_path).render([]) == "</s>d"
    (tmp_path / "chat_template.jinja").write_text("own")
    assert ChatTemplate(tmp_path).render([]) == "own"
    other = tmp_path / "other.jinja"
    other.write_text("{{ messages[0]['content'] }}, {{ strftime_now('%Y') }}, {{ tools | tojson }}")
    named = ChatTemplate(None, str(other), datetime(2024, 5, 6))
    assert named.render([{"content": "<b>"}], tools=["é"]) == '<b>, 2024, ["é"]'
    with pytest.raises(ConfigError, match=r"none\.jinja cannot be read"):
        ChatTemplate(tmp_path, str(tmp_path / "none.jinja"))
