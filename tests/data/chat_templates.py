"""Chat templates that are unlike one another, written in the manner of published models."""

from __future__ import annotations

import json
from pathlib import Path

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Every turn alike; a prompt of its own (ChatML)."""

INSTRUCTIONS = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}
    {%- set rest = messages[1:] %}
{%- else %}
    {%- set system = '' %}
    {%- set rest = messages %}
{%- endif %}
{%- for m in rest %}
    {%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate user/assistant') }}
    {%- endif %}
    {%- if m['role'] == 'user' %}
        {{- '[INST] ' + (system if loop.first else '') + m['content'].strip() + ' [/INST]' }}
    {%- else %}
        {{- ' ' + m['content'].strip() + eos_token }}
    {%- endif %}
{%- endfor %}"""
"""No words for the assistant's turn, the system's inside the user's, roles checked (Llama 2, Mistral)."""

THINKING = r"""
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}
    {%- if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- if ns.last < 0 %}{{ raise_exception('no user query') }}{% endif %}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {%- set said = m.content %}
        {%- set thought = '' %}
        {%- if '</think>' in said %}
            {%- set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}
            {%- set said = said.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last %}
            {{- '<|im_start|>assistant\n<think>\n' + thought + '\n</think>\n\n' + said + '<|im_end|>\n' }}
        {%- else %}
            {{- '<|im_start|>assistant\n' + said + '<|im_end|>\n' }}
        {%- endif %}
    {%- else %}
        {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
"""The last turn has thoughts that are taken out of earlier ones: the start of a conversation changes as it goes on
(Qwen3)."""

TAGGED = """{% for m in messages %}{{ '<|' + m['role'] + '|>\n' }}
{%- if m['role'] == 'assistant' %}
    {%- generation %}{{ m['content'] }}{% if not loop.last %}{{ eos_token + '\n' }}{% else %}{{ eos_token }}{% endif %}
    {%- endgeneration %}
{%- else %}
    {{- m['content'] + '\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""
"""Says itself what is the assistant's."""

PLAIN = (
    "{% for m in messages %}{% if m['role'] == 'user' %}### Instruction:\n{{ m['content'] }}\n\n### Response:\n"
    "{% elif m['role'] == 'system' %}{{ m['content'] }}\n\n{% else %}{{ m['content'] | trim }}{{ eos_token }}\n\n"
    "{% endif %}{% endfor %}"
)
"""The words for the assistant belong to the user's turn; no prompt to ask for (Alpaca)."""

LATE = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system, rest = messages[0]['content'] + '\n\n', messages[1:] %}
{%- else %}
    {%- set system, rest = '', messages %}
{%- endif %}
{%- set last = rest | selectattr('role', 'equalto', 'user') | list | last %}
{%- for m in rest %}
    {%- if m['role'] == 'user' %}
        {{- '[INST] ' + (system if m == last else '') + m['content'] + '[/INST]' }}
    {%- else %}
        {{- ' ' + m['content'] + eos_token }}
    {%- endif %}
{%- endfor %}"""
"""The system's words move on to the latest question (Mistral)."""

CHANNELS = (
    "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final{% endif %}<|message|>"
    "{{ m.content }}{% if m.role == 'assistant' and loop.last %}<|return|>{% else %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
"""The last turn ends with another token than earlier ones, and the assistant names a channel itself (gpt-oss)."""

TEMPLATES = {
    "chatml": CHATML,
    "instructions": INSTRUCTIONS,
    "thinking": THINKING,
    "tagged": TAGGED,
    "plain": PLAIN,
    "late": LATE,
    "channels": CHANNELS,
}
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
SPECIAL += ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"]
END = {"chatml": "<|im_end|>", "thinking": "<|im_end|>", "channels": "<|return|>"}
"""The end token of who has not </s>."""


def save_tokenizer(folder: Path, name: str, vocab_size: int = 384) -> Path:
    """A byte-level tokenizer of its own with one of the templates, as transformers loads it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["How old is the sun and the moon? number yes one two three"] * 20, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": END.get(name, "</s>")}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": TEMPLATES[name]}))
    return folder
