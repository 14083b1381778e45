"""Conversations for fine-tuning: JSON records through the tokenizer's chat template; which part the assistant says.

A template says that itself with ``{% generation %}``, or leaves it to be found: a turn of the assistant is what it adds
to the prompt that the conversation before it renders to.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.schema import Config, Data
from moe_dtensor.data.chat import ChatTemplate, ConversationError, Message
from moe_dtensor.data.pack import Conversation
from moe_dtensor.data.records import WHOLE, Record
from moe_dtensor.data.text import FilesCorpus
from moe_dtensor.data.tokenizer import Tokenizer, files_beside

Span = tuple[int, int]
"""First character, and the one after the last."""
Tools = Sequence[Any] | None
NONCHARACTERS = [chr(c) for c in range(0xFDD0, 0xFDF0)]
"""Code points that Unicode keeps out of texts."""


def assistant_spans(
    template: ChatTemplate, messages: Sequence[Message], tools: Tools = None, first: int = 0
) -> tuple[str, list[Span]]:
    """The whole conversation as text, and which of its characters the assistant says: in order, without overlap.

    Args:
        template: of the tokenizer.
        messages: in their order.
        tools: see :meth:`ChatTemplate.render`.
        first: index of the first message that counts; what the assistant says before it is left out.

    Raises:
        ConversationError: the template does not take the messages.
    """
    marks = _free_marks(messages)
    marked = template.render(messages, False, tools, marks)
    if marks[0] in marked:
        before = template.render(messages[:first], False, tools, marks).count(marks[0]) if first else 0
        text, spans = _read_marks(marked, *marks)
        return text, spans[before:]
    turns = [i for i in range(first, len(messages)) if messages[i].get("role") == "assistant"]
    found = [_find_turn(template, marked, messages, tools, i) for i in turns]
    return marked, [span for span in found if span[0] < span[1]]


def _find_turn(template: ChatTemplate, whole: str, messages: Sequence[Message], tools: Tools, index: int) -> Span:
    """What turn ``index`` adds to the prompt, up to and with the token that ends it.

    Where the conversation up to the turn renders as it does in the whole, the two ends are those of two such
    renderings. A template may change turns that others follow, though (Qwen3 takes thoughts out of them), or take no
    conversation without a user: then the place of the content decides, found by rendering another in its place, and of
    what is around it that which is the same in both.
    """
    prompt = _try(template, messages[:index], tools, True)
    upto = _try(template, messages[: index + 1], tools)
    if prompt is not None and upto is not None and whole.startswith(upto) and upto.startswith(prompt):
        return _without_separator(template, whole, len(prompt), len(upto))
    content, after = _find_content(template, whole, messages, tools, index)
    is_last = index == len(messages) - 1
    start, end = content, len(whole) if is_last else after
    before = _try(template, messages[:index], tools)
    if prompt is not None and before is not None and whole.startswith(before) and len(before) <= content:
        start = min(content, max(len(before), _common(whole, prompt)))
    if upto is not None and not is_last:
        content_there, after_there = _find_content(template, upto, messages[: index + 1], tools, index)
        if start == content and prompt is not None and upto.startswith(prompt):
            said_before = upto[len(prompt) : content_there]
            start -= len(said_before) if whole[:content].endswith(said_before) else 0
        end = _whole_token(template, whole, after + _common(whole[after:], upto[after_there:]))
    return _without_separator(template, whole, start, end)


def _find_content(template: ChatTemplate, whole: str, messages: Sequence[Message], tools: Tools, index: int) -> Span:
    """Where the content of message ``index`` is in ``whole``."""
    other = {**messages[index], "content": next(c for c in NONCHARACTERS if c not in whole)}
    replaced = template.render([*messages[:index], other, *messages[index + 1 :]], False, tools)
    start = _common(whole, replaced)
    return start, len(whole) - _common(whole[start:][::-1], replaced[start:][::-1])


def _whole_token(template: ChatTemplate, whole: str, end: int) -> int:
    """``end``, or the end of the special token that it would cut."""
    starts = ((whole.rfind(token, 0, end + len(token) - 1), len(token)) for token in template.special_tokens)
    return max([end, *(start + size for start, size in starts if 0 <= start < end)])


def _without_separator(template: ChatTemplate, whole: str, start: int, end: int) -> Span:
    """Without the blanks that follow the token that ends a turn: no assistant gets to say them."""
    said = whole[start:end]
    last = max((said.rfind(t) + len(t) for t in template.special_tokens if t in said), default=0)
    return (start, start + last) if last and not said[last:].strip() else (start, end)


def _try(template: ChatTemplate, messages: Sequence[Message], tools: Tools, prompt: bool = False) -> str | None:
    try:
        return template.render(messages, prompt, tools)
    except ConversationError:
        return None


def _free_marks(messages: Sequence[Message]) -> tuple[str, str]:
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


MESSAGES = "messages"
NOW = datetime(2025, 1, 1)
"""For templates that write the date: the same tokens on every day."""


class ConversationsCorpus(FilesCorpus):
    """Records with ``messages``, or with ``prompt`` and ``completion``; JSON lines, JSON, parquet, arrow or csv.

    What the assistant says is trained on; of a prompt and completion what it says in the completion. Without
    ``data.validation_path`` about one conversation in 20, by hash of its text, is held out.

    Raises:
        ConfigError: as :class:`FilesCorpus`; a file of plain text; no chat template.
    """

    marked = True
    """Its tokens carry :mod:`moe_dtensor.data.pack`."""

    def __init__(self, config: Config, tokenizer: Tokenizer) -> None:
        super().__init__(config, tokenizer)
        data = config.data
        for file, form in self.files.formats.items():
            if form.kind == "text" and file in self.files.taken:
                raise ConfigError(
                    f"data.corpus = 'conversations' reads records, such as JSON lines; {file!r} is plain text.",
                    "Leave it out of data.path, or set data.corpus = 'files'.",
                )
        self.text_key = WHOLE
        self.messages_key = MESSAGES if data.text_key == Data().text_key else data.text_key
        beside = None if data.tokenizer == "bytes" else files_beside(data.tokenizer)
        self.template = ChatTemplate(beside, data.chat_template, NOW)

    def judge(self, record: Record) -> Record:
        """The record with its conversation as text, or why it has none."""
        if record.text is None:
            return record
        try:
            messages, first, tools = find_messages(json.loads(record.text), self.messages_key)
            text, spans = assistant_spans(self.template, messages, tools, first)
            if not spans:
                raise ConversationError("the assistant says nothing that could be trained on")
        except ConversationError as error:
            return Record(None, record.row, error.problem.rstrip("."), record.after)
        conversation = Conversation(text)
        conversation.spans = spans
        return Record(conversation, record.row, "", record.after)

    def cache_key(self) -> str:
        """Of the files, and of the template."""
        return f"conversations {super().cache_key()} {self.messages_key} {self.template.special} {self.template.text}"


def find_messages(record: dict[str, Any], key: str) -> tuple[list[dict[str, Any]], int, list[Any] | None]:
    """Messages of a record, index of the first that counts, and its tools.

    Raises:
        ConversationError: the record holds no conversation.
    """
    tools = record.get("tools") or None
    if record.get(key) is not None:
        return check_messages(record[key], key), 0, tools
    if record.get("prompt") is None or record.get("completion") is None:
        raise ConversationError(f"the record has neither {key!r} nor 'prompt' and 'completion', but {list(record)}")
    prompt = as_messages(record["prompt"], "user", "prompt")
    return [*prompt, *as_messages(record["completion"], "assistant", "completion")], len(prompt), tools


def as_messages(value: Any, role: str, key: str) -> list[dict[str, Any]]:
    """A text as the one message of a role; messages as they are."""
    return [{"role": role, "content": value}] if isinstance(value, str) else check_messages(value, key)


def check_messages(value: Any, key: str) -> list[dict[str, Any]]:
    """``value``, if it is a list of objects with a role, and with a content or calls of tools."""
    if isinstance(value, str):  # a cell of a csv
        try:
            value = json.loads(value)
        except ValueError:
            raise ConversationError(f"{key!r} is no list of messages, but a text") from None
    if not isinstance(value, list) or not value:
        raise ConversationError(f"{key!r} is no list of messages, but {type(value).__name__}")
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ConversationError(f"message {number} of {key!r} has no role")
        if message.get("content") is None and not message.get("tool_calls"):
            raise ConversationError(f"message {number} of {key!r} has no content")
    # Tables fill in every field that another row has.
    return [{k: part for k, part in message.items() if part is not None or k == "content"} for message in value]
