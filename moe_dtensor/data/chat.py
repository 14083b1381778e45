"""Conversations as text, by the template that comes with a tokenizer.

A template is somebody else's program: it runs in jinja2's sandbox, with what transformers gives its templates. jinja2
is loaded when there is a template to render.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_dtensor.config.errors import ConfigError

if TYPE_CHECKING:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = Mapping[str, Any]
"""``{"role": ..., "content": ...}``, and what else a template reads."""


class ConversationError(ConfigError):
    """Messages that a template does not take."""


class ChatTemplate:
    """The chat template of a tokenizer's folder.

    Args:
        folder: with ``chat_template.jinja``, or a ``tokenizer_config.json`` that holds the template. None: of the bytes
            tokenizer, which has none.
        file: of another template, which counts instead (``data.chat_template``).
        now: what a template takes for the present. None: the present.

    Raises:
        ConfigError: there is none, it is no template, or jinja2 is not installed.
    """

    def __init__(self, folder: Path | None, file: str = "", now: datetime | None = None) -> None:
        self.place = str(file or folder)
        settings = _read_settings(folder) if folder is not None else {}
        text = _read_text(Path(os.path.expanduser(file))) if file else _find_text(folder, settings)
        if text is None:
            raise ConfigError(
                f"{folder or 'The tokenizer of bytes'} has no chat template (chat_template.jinja, or chat_template in "
                "tokenizer_config.json).",
                "Take the folder of a tokenizer that has one, or write the template into chat_template.jinja.",
            )
        try:
            from jinja2 import TemplateError
        except ImportError:
            raise ConfigError(
                "chat templates need jinja2, which is not installed.", "Install it: pip install jinja2."
            ) from None
        self._error = TemplateError
        self._environment = _build_environment(lambda form: (now or datetime.now()).strftime(form))
        try:
            self._template = self._environment.from_string(text)
        except TemplateError as error:
            raise ConfigError(f"the chat template of {self.place} is broken: {error}.", "Fetch it again.") from None
        self.special = {
            key: _token_text(value) for key, value in settings.items() if key.endswith("_token") and value is not None
        }
        """Texts of the special tokens by name (``eos_token``), which a template may write."""
        self.special_tokens = _special_tokens(folder, self.special)
        """Texts of all tokens that are no text of their own."""
        self.text = text

    def render(
        self,
        messages: Sequence[Message],
        generation_prompt: bool = True,
        tools: Sequence[Any] | None = None,
        marks: tuple[str, str] = ("", ""),
    ) -> str:
        """The conversation as text.

        Args:
            messages: in order.
            generation_prompt: end with what comes before the assistant's next words.
            tools: what the assistant may call, as the template wants it.
            marks: put around what ``{% generation %}`` encloses.

        Raises:
            ConversationError: the template refuses the messages.
        """
        self._environment.globals["generation_marks"] = marks
        try:
            return self._template.render(
                messages=[dict(m) for m in messages],
                tools=tools,
                documents=None,
                add_generation_prompt=generation_prompt,
                **self.special,
            )
        except (self._error, TypeError, ValueError, LookupError, AttributeError) as error:
            raise ConversationError(
                f"the chat template of {self.place} refuses the messages: {error}.",
                'Give {"role": ..., "content": ...} each, in roles and in an order that the template knows.',
            ) from None


def _read_settings(folder: Path) -> dict[str, Any]:
    """What the files beside the vocabulary say; of a token named in both the newer file's."""
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        settings |= {key: value for key, value in _read_json(folder / name).items() if value is not None}
    return settings


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON ({error}).", "Fetch the file again.") from None
    return content if isinstance(content, dict) else {}


def _find_text(folder: Path | None, settings: Mapping[str, Any]) -> str | None:
    if folder is not None and (folder / "chat_template.jinja").is_file():
        return _read_text(folder / "chat_template.jinja")
    stated = settings.get("chat_template")
    if isinstance(stated, list):  # several by name
        stated = {entry.get("name"): entry.get("template") for entry in stated}.get("default")
    return stated if isinstance(stated, str) else None


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the chat template {file} cannot be read: {error}.", "Name a file of Jinja.") from None


def _token_text(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _special_tokens(folder: Path | None, named: Mapping[str, Any]) -> tuple[str, ...]:
    found = {token for token in named.values() if isinstance(token, str) and token}
    added = _read_json(folder / "tokenizer.json").get("added_tokens", []) if folder is not None else []
    found |= {str(token["content"]) for token in added if isinstance(token, dict) and token.get("special")}
    return tuple(sorted(found))


def _build_environment(strftime_now: Callable[[str], str]) -> ImmutableSandboxedEnvironment:
    """A sandbox with the filters and functions that templates rely on.

    Args:
        strftime_now: the date in a form.
    """
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` … ``{% endgeneration %}``: puts ``generation_marks`` around what the assistant says."""

        tags = {"generation"}  # noqa: RUF012  (as jinja2 has it)

        def parse(self, parser: Parser) -> nodes.Node:
            """A call of :meth:`mark` with what is inside."""
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

        def mark(self, caller: Callable[[], str]) -> str:
            """What is inside, between the marks."""
            marks: Any = self.environment.globals.get("generation_marks", ("", ""))
            return f"{marks[0]}{caller()}{marks[1]}"

    def refuse(message: str) -> None:
        """What a template calls to refuse a conversation."""
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = strftime_now
    return environment


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    """JSON as it is; Jinja's own filter writes it for HTML."""
    known = {key: options[key] for key in ("ensure_ascii", "separators", "sort_keys") if key in options}
    return json.dumps(value, indent=indent, **{"ensure_ascii": False, **known})
