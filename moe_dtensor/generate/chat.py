"""Conversations as text, by the template that comes with a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_dtensor.config.errors import ConfigError


def render(folder: Path, messages: Sequence[Mapping[str, str]]) -> str:
    """The text up to where the assistant begins.

    Args:
        folder: with chat_template.jinja, or a tokenizer_config.json that names one.
        messages: ``{"role": ..., "content": ...}`` each.

    Raises:
        ConfigError: there is no template, or it refuses the messages.
    """
    settings: dict[str, Any] = {}
    file = folder / "tokenizer_config.json"
    if file.is_file():
        settings = json.loads(file.read_text(encoding="utf-8"))
    own = folder / "chat_template.jinja"
    template = own.read_text(encoding="utf-8") if own.is_file() else settings.get("chat_template")
    if not isinstance(template, str):
        raise ConfigError(
            f"--chat: {folder} has no chat template (chat_template.jinja, or one in tokenizer_config.json).",
            "Take --chat out, or add the template of the model's tokenizer.",
        )
    try:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise ConfigError("--chat needs jinja2, which is not installed.", "Install it: pip install jinja2.") from None

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    special = {key: _text(value) for key, value in settings.items() if key.endswith("_token")}
    try:
        return environment.from_string(template).render(
            messages=[dict(m) for m in messages], add_generation_prompt=True, **special
        )
    except TemplateError as error:
        raise ConfigError(f"--chat: the template refuses the messages: {error}.", "Correct their roles.") from None


def _text(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token
