"""Conversations as text, by the template that comes with a tokenizer, and which of that text the assistant says.

A template says what is the assistant's with ``{% generation %}``, or leaves it to be found: what a turn adds to the
prompt that the conversation so far renders to. Loads no torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from moe_dtensor.config.errors import ConfigError

Message = Mapping[str, Any]
"""``{"role": ..., "content": ...}``, and what else a template reads."""
Span = tuple[int, int]
"""First character, and the one after the last."""

SETTINGS = ("special_tokens_map.json", "tokenizer_config.json")
"""Files beside a tokenizer that name its special tokens; the later one counts."""
NONCHARACTERS = [chr(c) for c in range(0xFDD0, 0xFDF0)]
"""Code points that Unicode keeps out of texts."""


class ConversationError(Exception):
    """A template does not take a conversation: wrong order of roles, a field that it misses."""


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        text: Jinja, as transformers takes it.
        variables: of the tokenizer, such as ``bos_token``.
        special: tokens that stand for no text of their own.
        now: for templates that tell the date. None: the present.

    Raises:
        ConfigError: jinja2 is not installed, or the template is not valid.
    """

    def __init__(
        self, text: str, variables: Mapping[str, Any], special: Sequence[str] = (), now: datetime | None = None
    ) -> None:
        try:
            import jinja2

            from moe_dtensor.data.jinja import build_environment
        except ImportError:
            raise ConfigError("A chat template needs jinja2, which is not installed.", "pip install jinja2") from None
        self._errors: tuple[type[Exception], ...] = (jinja2.TemplateError, TypeError, ValueError, LookupError)
        self.variables, self.special = dict(variables), tuple(special)
        self.text = text
        self._environment = build_environment(lambda form: (now or datetime.now()).strftime(form))
        try:
            self._template = self._environment.from_string(text)
        except jinja2.TemplateError as error:
            raise ConfigError(f"The chat template is not valid: {error}.", "Correct it.") from None

    def render(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None, add_generation_prompt: bool = False
    ) -> str:
        """The conversation as text.

        Args:
            messages: in their order.
            tools: what the assistant may call, as the template wants it.
            add_generation_prompt: up to where the assistant begins.

        Raises:
            ConversationError: the template does not take the messages.
        """
        return self._render(messages, tools, add_generation_prompt, ("", ""))

    def assistant_spans(
        self, messages: Sequence[Message], tools: Sequence[Any] | None = None, first: int = 0
    ) -> tuple[str, list[Span]]:
        """The whole conversation, and which of its characters the assistant says: in order, without overlap.

        Args:
            messages: in their order.
            tools: as for :meth:`render`.
            first: index of the first message that counts; what the assistant says before is left out.

        Raises:
            ConversationError: the template does not take the messages.
        """
        begin, end = _marks(messages)
        marked = self._render(messages, tools, False, (begin, end))
        if begin in marked:
            before = self._render(messages[:first], tools, False, (begin, end)).count(begin) if first else 0
            text, spans = _read_marks(marked, begin, end)
            return text, spans[before:]
        turns = [i for i in range(first, len(messages)) if messages[i].get("role") == "assistant"]
        found = [self._turn(marked, messages, tools, i) for i in turns]
        return marked, [span for span in found if span[0] < span[1]]

    def _render(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, prompt: bool, marks: tuple[str, str]
    ) -> str:
        self._environment.globals["generation_marks"] = marks
        try:
            return self._template.render(
                messages=[dict(m) for m in messages],
                tools=tools,
                documents=None,
                add_generation_prompt=prompt,
                **self.variables,
            )
        except self._errors as error:
            raise ConversationError(str(error) or type(error).__name__) from None

    def _turn(self, whole: str, messages: Sequence[Message], tools: Sequence[Any] | None, index: int) -> Span:
        """What turn ``index`` adds to the prompt, up to and with the token that ends it.

        Where the conversation up to the turn renders as it does in the whole, the two ends are those of two such
        renderings. A template may change turns that others follow, though (Qwen3 takes thoughts out of them), or take
        no conversation without a user: then the place of the content decides, found by rendering another in its
        place, and of what is around it that which is the same in both.
        """
        prompt = self._try(messages[:index], tools, True)
        upto = self._try(messages[: index + 1], tools, False)
        if prompt is not None and upto is not None and whole.startswith(upto) and upto.startswith(prompt):
            return self._without_separator(whole, len(prompt), len(upto))
        content, after = self._content(whole, messages, tools, index)
        start, end = content, len(whole) if index == len(messages) - 1 else after
        before = self._try(messages[:index], tools, False)
        if prompt is not None and before is not None and whole.startswith(before) and len(before) <= content:
            start = min(content, max(len(before), _common(whole, prompt)))
        if upto is not None and index < len(messages) - 1:
            _, after_there = self._content(upto, messages[: index + 1], tools, index)
            end = after + _common(whole[after:], upto[after_there:])
        return self._without_separator(whole, start, end)

    def _content(self, whole: str, messages: Sequence[Message], tools: Sequence[Any] | None, index: int) -> Span:
        """Where the content of message ``index`` is in ``whole``."""
        other = next(c for c in NONCHARACTERS if c not in whole)
        replaced = self._try([*messages[:index], {**messages[index], "content": other}, *messages[index + 1 :]], tools)
        if replaced is None:
            raise ConversationError(f"message {index + 1}: the template takes no other content in its place")
        start = _common(whole, replaced)
        end = len(whole) - _common(whole[start:][::-1], replaced[start:][::-1])
        return start, end

    def _without_separator(self, whole: str, start: int, end: int) -> Span:
        """Without the blanks that follow the token that ends a turn: no assistant gets to say them."""
        said = whole[start:end]
        last = max((said.rfind(t) + len(t) for t in self.special if t in said), default=0)
        return (start, start + last) if last and not said[last:].strip() else (start, end)

    def _try(self, messages: Sequence[Message], tools: Sequence[Any] | None, prompt: bool = False) -> str | None:
        try:
            return self._render(messages, tools, prompt, ("", ""))
        except ConversationError:
            return None


def load_chat_template(tokenizer: str | Path, file: str = "", now: datetime | None = None) -> ChatTemplate:
    """The template of a tokenizer: chat_template.jinja in its folder, or the one in its tokenizer_config.json.

    Args:
        tokenizer: as ``data.tokenizer``: a folder, a file in it, or ``bytes``.
        file: of another template, which counts instead.
        now: see :class:`ChatTemplate`.

    Raises:
        ConfigError: there is none, a file is broken, or jinja2 is missing.
    """
    place = Path(tokenizer).expanduser()
    folder = None if str(tokenizer) == "bytes" else place if place.is_dir() else place.parent
    settings: dict[str, Any] = {}
    for name in SETTINGS:
        if folder is not None and (folder / name).is_file():
            settings |= {k: v for k, v in _read_json(folder / name).items() if v is not None}
    text = _template_text(folder, file, settings)
    tokens = {key: _token(value) for key, value in settings.items() if key.endswith("_token")}
    variables = {key: token for key, token in tokens.items() if isinstance(token, str) and token}
    special = set(variables.values())
    added = _read_json(folder / "tokenizer.json").get("added_tokens", []) if folder is not None else []
    special |= {str(token.get("content")) for token in added if isinstance(token, dict) and token.get("special")}
    return ChatTemplate(text, variables, sorted(special), now)


def _template_text(folder: Path | None, file: str, settings: Mapping[str, Any]) -> str:
    own = Path(file).expanduser() if file else None if folder is None else folder / "chat_template.jinja"
    if own is not None and (file or own.is_file()):
        try:
            return own.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"The chat template {str(own)!r} cannot be read: {error}.", "Name a file of Jinja."
            ) from None
    text = settings.get("chat_template")
    if isinstance(text, list):  # several by name
        text = {one.get("name"): one.get("template") for one in text if isinstance(one, dict)}.get("default")
    if not isinstance(text, str):
        place = "data.tokenizer = 'bytes'" if folder is None else f"{os.fspath(folder)!r}"
        raise ConfigError(
            f"{place} has no chat template (chat_template.jinja, or one in tokenizer_config.json).",
            "Add the template of the model's tokenizer, or name one: data.chat_template.",
        )
    return text


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{str(file)!r} cannot be read: {error}.", "Copy the file again.") from None
    return content if isinstance(content, dict) else {}


def _token(value: Any) -> Any:
    return value.get("content") if isinstance(value, dict) else value


def _marks(messages: Sequence[Message]) -> tuple[str, str]:
    """Two characters that are in no message."""
    said = json.dumps([dict(m) for m in messages], ensure_ascii=False, default=str)
    free = [c for c in NONCHARACTERS if c not in said]
    if len(free) < 3:
        raise ConversationError("the messages are full of noncharacters (U+FDD0 to U+FDEF)")
    return free[-2], free[-1]


def _read_marks(marked: str, begin: str, end: str) -> tuple[str, list[Span]]:
    """The text without its marks, and what they enclose."""
    parts: list[str] = []
    spans: list[Span] = []
    place = 0
    for number, part in enumerate(marked.split(begin)):
        said, _, rest = part.partition(end) if number else ("", "", part)
        if said:
            spans.append((place, place + len(said)))
        parts += [said, rest]
        place += len(said) + len(rest)
    return "".join(parts), spans


def _common(a: str, b: str) -> int:
    """Length of the longest common start."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle - 1)
    return low
