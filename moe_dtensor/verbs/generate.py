"""``generate``: continue prompts with a run, a checkpoint or a Hugging Face folder."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_dtensor.config.command_line import Parser, read_world_size, split_overrides
from moe_dtensor.config.errors import ConfigError

if TYPE_CHECKING:
    from moe_dtensor.data.chat import ChatTemplate
    from moe_dtensor.data.tokenizer import Tokenizer

HELP = "continue text with a model (under torchrun for several ranks)"
LIMITS = {"float64": 1e-12, "float32": 1e-4, "bfloat16": 0.1}
"""How far --check lets a step's logits be from a full forward pass, over the largest. In bfloat16 a token may go to
another expert."""


@dataclass(frozen=True)
class Prompt:
    """One line of the input: a text, or the messages of a conversation."""

    text: str
    messages: tuple[dict[str, str], ...] = ()


def main(argv: list[str]) -> int:
    """Print what comes after each prompt; 1 if --check finds a difference, else 0."""
    own, overrides = split_overrides(argv)
    options = _parse(own)
    prompts = _prompts(options)
    world_size = read_world_size(1)

    from moe_dtensor.data.chat import ChatTemplate
    from moe_dtensor.generate.batch import Sampling, complete
    from moe_dtensor.generate.load import find_source, load_model, load_tokenizer, tokenizer_folder
    from moe_dtensor.train.ranks import end_ranks, start_ranks

    source = find_source(options.checkpoint, overrides, world_size)
    tokenizer, ends = load_tokenizer(source)
    template = ChatTemplate(tokenizer_folder(source), source.config.data.chat_template) if options.chat else None
    ids = [_encode(prompt, template, tokenizer) for prompt in prompts]
    _check_lengths(ids, options.max_tokens, source.max_length)
    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.seed)
    device = start_ranks(source.config)
    model = load_model(source, device)
    is_rank_0, worst = os.environ["RANK"] == "0", 0.0
    for first in range(0, len(ids), options.batch_size):
        batch = ids[first : first + options.batch_size]
        stream = Stream(tokenizer, ends) if is_rank_0 and options.prompt is not None else None
        completions, error = complete(
            model,
            batch,
            options.max_tokens,
            sampling,
            ends,
            first_number=first,
            on_tokens=stream,
            check=options.check,
        )
        worst = max(worst, error)
        if stream:
            stream.end()
        elif is_rank_0:
            for prompt, completion in zip(prompts[first:], completions, strict=False):
                _print_line(prompt, tokenizer.decode(completion.ids), len(completion.ids), completion.ended)
    limit = LIMITS[model.config.training.param_dtype]
    if options.check and is_rank_0:
        verdict = "are" if worst <= limit else "are NOT"
        print(
            f"check: logits {verdict} those of a full forward pass: {worst:.1e} of the largest (limit {limit:.0e})",
            file=sys.stderr,
        )
    status = 1 if options.check and worst > limit else 0
    end_ranks()
    return status


class Stream:
    """Writes the text of one completion as it grows; bytes of a letter that is not whole yet wait."""

    def __init__(self, tokenizer: Tokenizer, ends: set[int]) -> None:
        self.tokenizer, self.ends = tokenizer, ends
        self.ids: list[int] = []
        self.written = 0

    def __call__(self, newest: list[int]) -> None:
        """Called after each step with one id."""
        if newest[0] >= 0 and newest[0] not in self.ends:
            self.ids.append(newest[0])
            self._write(self.tokenizer.decode(self.ids), whole=False)

    def end(self) -> None:
        """Write what waits, and end the line."""
        self._write(self.tokenizer.decode(self.ids), whole=True)
        print(flush=True)

    def _write(self, text: str, whole: bool) -> None:
        while not whole and text.endswith("\ufffd"):
            text = text[:-1]
        if len(text) > self.written:
            print(text[self.written :], end="", flush=True)
            self.written = len(text)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        "generate", f"{HELP}. --table.key value changes the config, such as --mesh.tp 4.", needs_config=False
    )
    parser.add_argument(
        "--checkpoint", required=True, metavar="DIR", help="a run, a checkpoint, or a Hugging Face folder"
    )
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--prompt", metavar="TEXT", help="its continuation is written as it grows")
    text.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE.jsonl",
        help='lines of {"prompt": TEXT}, or {"messages": [...]} with --chat',
    )
    parser.add_argument("--max-tokens", type=int, default=128, metavar="N", help="new tokens at most; default: 128")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0, the default: the likeliest token"
    )
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="among the likeliest of this probability")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="among the K likeliest; 0: all")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn; each prompt has its own stream")
    parser.add_argument(
        "--chat", action="store_true", help="prompts are what a user says, in the tokenizer's chat template"
    )
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="prompts at once; default: 32")
    parser.add_argument("--check", action="store_true", help="compare every step with a full forward pass")
    options = parser.parse_args(argv)
    for name, wrong, remedy in (
        ("--max-tokens", options.max_tokens < 1, "Give 1 or more."),
        ("--batch-size", options.batch_size < 1, "Give 1 or more."),
        ("--temperature", not 0 <= options.temperature < math.inf, "Give 0 or more."),
        ("--top-k", options.top_k < 0, "Give 0 or more."),
        ("--top-p", not 0 < options.top_p <= 1, "Give a share above 0, up to 1."),
    ):
        if wrong:
            raise ConfigError(f"{name} {getattr(options, name[2:].replace('-', '_'))} makes no sense.", remedy)
    return options


def _prompts(options: argparse.Namespace) -> list[Prompt]:
    if options.prompt is not None:
        return [Prompt(options.prompt)]
    try:
        lines = options.prompts.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts {options.prompts} cannot be read: {error}.", "Give a .jsonl file.") from None
    found = [_prompt(line, number, options) for number, line in enumerate(lines, start=1) if line.strip()]
    if not found:
        raise ConfigError(f"--prompts {options.prompts} has no line.", 'Write lines of {"prompt": TEXT}.')
    return found


def _prompt(line: str, number: int, options: argparse.Namespace) -> Prompt:
    try:
        record: Any = json.loads(line)
    except ValueError:
        record = None
    record = {"prompt": record} if isinstance(record, str) else record
    if isinstance(record, dict) and isinstance(record.get("prompt"), str):
        return Prompt(record["prompt"])
    if isinstance(record, dict) and options.chat and isinstance(record.get("messages"), list):
        return Prompt("", tuple(record["messages"]))
    raise ConfigError(
        f"{options.prompts}, line {number}: no prompt.",
        'Write {"prompt": TEXT}' + (', or {"messages": [...]}.' if options.chat else "; messages need --chat."),
    )


def _encode(prompt: Prompt, template: ChatTemplate | None, tokenizer: Tokenizer) -> list[int]:
    """Ids; of an empty text the end token, after which documents begin."""
    text = prompt.text
    if template is not None:
        text = template.render(prompt.messages or ({"role": "user", "content": prompt.text},))
    (ids,) = tokenizer.encode_batch([text])
    return [int(i) for i in ids] or [tokenizer.end_id]


def _check_lengths(ids: Sequence[Sequence[int]], max_tokens: int, positions: int) -> None:
    """Refuse a prompt that leaves no position to continue at; say so if a completion may leave them."""
    longest = max(map(len, ids))
    if longest >= positions:
        number = next(n for n, prompt in enumerate(ids, start=1) if len(prompt) == longest)
        raise ConfigError(
            f"prompt {number} has {longest} tokens, and the model was made for {positions} positions.",
            f"Give one of {positions - 1} tokens at most.",
        )
    if longest + max_tokens > positions and os.environ.get("RANK", "0") == "0":
        print(
            f"note: with --max-tokens {max_tokens} a text may be longer than the {positions} positions that the model "
            "was made for",
            file=sys.stderr,
        )


def _print_line(prompt: Prompt, text: str, tokens: int, ended: bool) -> None:
    said: dict[str, Any] = {"messages": list(prompt.messages)} if prompt.messages else {"prompt": prompt.text}
    print(json.dumps(said | {"completion": text, "tokens": tokens, "ended": ended}, ensure_ascii=False), flush=True)
