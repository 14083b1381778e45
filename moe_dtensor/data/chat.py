"""Conversations as text, by the template that comes with a tokenizer.

A template is somebody else's program: it runs in jinja2's sandbox, with what transformers gives its templates.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_dtensor.config.errors import ConfigError

Message = Mapping[str, Any]
"""``{"role": ..., "content": ...}``, and what else a template reads."""


class ChatTemplate:
    """The chat template of a tokenizer's folder.

    Args:
        folder: with ``chat_template.jinja``, or a ``tokenizer_config.json`` that holds the template.

    Raises:
        ConfigError: there is none, it is no template, or jinja2 is not installed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        settings = _read_settings(folder)
        text = _find_text(folder, settings)
        if text is None:
            raise ConfigError(
                f"{folder} has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json).",
                "Take the folder of a tokenizer that has one, or write the template into chat_template.jinja.",
            )
        try:
            from jinja2 import TemplateError
        except ImportError:
            raise ConfigError(
                "chat templates need jinja2, which is not installed.", "Install it: pip install jinja2."
            ) from None
        self._error = TemplateError
        try:
            self._template = _environment().from_string(text)
        except TemplateError as error:
            raise ConfigError(f"the chat template of {folder} is broken: {error}.", "Fetch it again.") from None
        self.special = {
            key: _token_text(value) for key, value in settings.items() if key.endswith("_token") and value is not None
        }
        """Texts of the special tokens by name (``eos_token``), which a template may write."""

    def render(self, messages: Sequence[Message], generation_prompt: bool = True) -> str:
        """The conversation as text.

        Args:
            messages: in order.
            generation_prompt: end with what comes before the assistant's next words.

        Raises:
            ConfigError: the template refuses the messages.
        """
        try:
            return self._template.render(
                messages=[dict(m) for m in messages], add_generation_prompt=generation_prompt, **self.special
            )
        except (self._error, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(
                f"the chat template of {self.folder} refuses the messages: {error}.",
                'Give {"role": ..., "content": ...} each, in roles and in an order that the template knows.',
            ) from None


def _read_settings(folder: Path) -> dict[str, Any]:
    """What the files beside the vocabulary say; of a token named in both the newer file's."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        file = folder / name
        try:
            content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        except ValueError as error:
            raise ConfigError(f"{file} is not JSON ({error}).", "Fetch the file again.") from None
        settings |= content if isinstance(content, dict) else {}
    return settings


def _find_text(folder: Path, settings: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    stated = settings.get("chat_template")
    if isinstance(stated, list):  # several by name
        stated = {entry.get("name"): entry.get("template") for entry in stated}.get("default")
    return stated if isinstance(stated, str) else None


def _token_text(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _environment() -> Any:
    """jinja2 as chat templates expect it: block tags leave no line, ``tojson`` does not escape, loops may break, and
    ``{% generation %}`` marks nothing here."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True))

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **how: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **how)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    environment.filters["tojson"] = to_json
    return environment
