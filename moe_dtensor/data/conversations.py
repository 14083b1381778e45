"""Conversations for fine-tuning: JSON records through the tokenizer's chat template."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.schema import Config, Data
from moe_dtensor.data.assistant import assistant_spans
from moe_dtensor.data.chat import ChatTemplate, ConversationError, template_folder
from moe_dtensor.data.marks import Conversation
from moe_dtensor.data.records import WHOLE, Record
from moe_dtensor.data.text import FilesCorpus
from moe_dtensor.data.tokenizer import Tokenizer

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
    """Its tokens carry :mod:`moe_dtensor.data.marks`."""

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
        self.template = ChatTemplate(template_folder(data.tokenizer), data.chat_template, NOW)

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
