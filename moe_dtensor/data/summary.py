"""What is told of the data at the start of a run: a line for each source."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

from moe_dtensor.config.schema import Config
from moe_dtensor.data.conversations import ConversationsCorpus
from moe_dtensor.data.files import DataFiles
from moe_dtensor.data.hub import DatasetsCorpus
from moe_dtensor.data.mixture import Mixture, source_config
from moe_dtensor.data.pack import packed
from moe_dtensor.data.text import FilesCorpus, StdlibCorpus
from moe_dtensor.data.tokens import TokensCorpus

NAMED = 3  # files left out for one reason that are named


def describe(config: Config, corpus: Any) -> str:
    """A line on each source: files, documents, tokens, what was left out and why, how documents end."""
    if isinstance(corpus, Mixture):
        each = zip(corpus.sources, corpus.corpora, strict=True)
        return "\n".join(describe(source_config(config, s), c).replace("data:", f"data: {s.name}:", 1) for s, c in each)
    splits = ["train", *(["validation"] if config.training.validation_interval else [])]
    place = f" {config.data.path!r}" if config.data.path else ""
    parts = [f"data: {config.data.corpus}{place}", *describe_files(corpus)]
    parts += [describe_split(corpus, split) for split in splits]
    parts.append(describe_ends(corpus))
    if left_out := describe_left_out(corpus):
        parts.append(left_out)
    return "; ".join(part for part in parts if part)


def describe_files(corpus: Any) -> list[str]:
    """How many files of what kind."""
    if isinstance(corpus, StdlibCorpus):
        return [f"{len(corpus.files):,} files (Python source)"]
    if isinstance(corpus, TokensCorpus):
        kinds = Counter(f"{f.kind}, {f.dtype.name}" for f in corpus.files)
        return [count_files(len(corpus.files), "; ".join(f"{n} {kind}" for kind, n in kinds.items()))]
    files: DataFiles | None = getattr(corpus, "files", None)
    if isinstance(corpus, FilesCorpus | DatasetsCorpus) and files is not None:
        return [count_files(len(files.taken), files.kinds())]
    return []


def count_files(count: int, kinds: str) -> str:
    """``3 files (2 jsonl; 1 csv)``."""
    return f"{count:,} file{'s' if count != 1 else ''} ({kinds})"


def describe_split(corpus: Any, split: str) -> str:
    """Documents and tokens of a split."""
    if isinstance(corpus, TokensCorpus):
        documents, tokens, bad = corpus.contents[split].documents, len(corpus.token_array(split)), 0
    elif getattr(corpus, "streaming", False):
        return f"{split}: documents and tokens are counted as they are read" if split == "train" else ""
    else:
        made = packed(corpus, split)
        documents, tokens, bad = made.documents, len(made.tokens_N), made.bad
    told = f"{documents:,} documents" if documents is not None else "documents not counted"
    return f"{split}: {told}, {tokens:,} tokens" + (f", {bad:,} bad records skipped" if bad else "")


def describe_ends(corpus: Any) -> str:
    """How documents end."""
    if isinstance(corpus, ConversationsCorpus):
        return "turns end as the chat template has it"
    end = f"end token (id {corpus.tokenizer.end_id})"
    if not isinstance(corpus, TokensCorpus):
        return f"each document is closed by the {end}"
    content = corpus.contents["train"]
    if content.closed is not None and content.closed < 1:
        return f"{content.closed:.0%} of the documents are closed by the {end}"
    if content.ends == 0:
        return f"no {end} among {content.seen:,} ids: documents run into one another"
    return f"documents are closed by the {end}"


def describe_left_out(corpus: Any) -> str:
    """Which files were left out, and why."""
    files = getattr(corpus, "files", None)
    left_out: dict[str, str] = getattr(corpus, "left_out", None) or getattr(files, "left_out", {}) or {}
    if not left_out:
        return ""
    by_reason: dict[str, list[str]] = {}
    for file, why in left_out.items():
        by_reason.setdefault(why, []).append(os.path.basename(file))
    told = [
        f"{', '.join(names[:NAMED])}{f' and {len(names) - NAMED:,} more' if len(names) > NAMED else ''} ({why})"
        for why, names in by_reason.items()
    ]
    return f"left out {len(left_out):,}: {', '.join(told)}"
