"""Which part of a conversation the assistant says, whatever the template.

A template says it itself with ``{% generation %}``, or leaves it to be found: a turn of the assistant is what it adds
to the prompt that the conversation before it renders to.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from moe_dtensor.data.chat import ChatTemplate, ConversationError, Message

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
