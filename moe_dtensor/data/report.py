"""What is told of data: a line for each source at the start of a run; of files that ``tokenize`` wrote, a survey."""

from __future__ import annotations

import hashlib
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np

from moe_dtensor.config.schema import Config
from moe_dtensor.data.conversations import ConversationsCorpus
from moe_dtensor.data.corpus import Mixture, source_config
from moe_dtensor.data.files import DataFiles
from moe_dtensor.data.hub import DatasetsCorpus
from moe_dtensor.data.pack import packed, replace_file
from moe_dtensor.data.text import FilesCorpus, StdlibCorpus
from moe_dtensor.data.token_files import TokenFiles, open_token_file
from moe_dtensor.data.tokenizer import Tokenizer
from moe_dtensor.data.tokens import TokensCorpus

DECODED = 1000  # documents that are looked at as text
DECODED_TOKENS = 4096  # of each
WINDOWS = 3


@dataclass(frozen=True)
class Report:
    """What was found in the training split."""

    documents: int
    tokens: int
    histogram: dict[str, int]
    """Documents by length in tokens, the end token included: ``"64-127"`` and so on."""
    median: int
    """Length that half of the documents do not exceed."""
    longest: int
    duplicates: int
    """Documents that are the same as an earlier one, by hash of their ids."""
    non_text: float
    """Share of control characters, unassigned ones and U+FFFD in the text of evenly spread documents."""
    windows: list[str]
    """Windows of seq_len tokens, decoded."""


def survey(folder: Path, tokenizer: Tokenizer, seq_len: int) -> Report:
    """Read the training split of a folder once."""
    files = TokenFiles([open_token_file("--output", str(path)) for path in sorted((folder / "train").glob("*.tokens"))])
    lengths: list[int] = []
    hashes: list[int] = []
    for ids_N in documents_of(files, tokenizer.end_id):
        lengths.append(len(ids_N) + 1)
        hashes.append(int.from_bytes(hashlib.blake2b(ids_N.tobytes(), digest_size=8).digest(), "little"))
    length_D = np.array(lengths, np.int64)
    starts = np.linspace(0, max(0, len(files) - seq_len), WINDOWS, dtype=np.int64).tolist() if len(files) else []
    return Report(
        documents=len(length_D),
        tokens=len(files),
        histogram=histogram(length_D),
        median=int(np.median(length_D)) if len(length_D) else 0,
        longest=int(length_D.max(initial=0)),
        duplicates=len(hashes) - len(np.unique(np.array(hashes, np.uint64))),
        non_text=non_text_share(files, length_D, tokenizer),
        windows=[tokenizer.decode(files[start : start + seq_len]) for start in starts],
    )


def documents_of(files: TokenFiles, end_id: int) -> Iterator[np.ndarray]:
    """Ids of each document, without its end token."""
    rest = np.empty(0, files.dtype)
    for _, ids_N in files.scan(0, len(files)):
        joined = np.concatenate([rest, ids_N])
        *whole, rest = np.split(joined, np.flatnonzero(joined == end_id) + 1)
        yield from (ids[:-1] for ids in whole)


def histogram(length_D: np.ndarray) -> dict[str, int]:
    """Documents by powers of two of their length."""
    if not len(length_D):
        return {}
    power_D = np.floor(np.log2(length_D)).astype(int)
    counts = np.bincount(power_D)
    return {f"{2**p}-{2 ** (p + 1) - 1}": int(counts[p]) for p in range(power_D.min(), len(counts))}


def non_text_share(files: TokenFiles, length_D: np.ndarray, tokenizer: Tokenizer) -> float:
    """Share of characters that are no text in documents spread evenly."""
    start_D = np.cumsum(length_D) - length_D
    bad = total = 0
    for index in np.unique(np.linspace(0, max(0, len(length_D) - 1), DECODED, dtype=np.int64)):
        if index >= len(length_D):
            continue
        start, length = int(start_D[index]), min(int(length_D[index]) - 1, DECODED_TOKENS)
        text = tokenizer.decode(files[start : start + length])
        total += len(text)
        bad += sum(c == "\ufffd" or (c not in "\n\r\t" and unicodedata.category(c).startswith("C")) for c in text)
    return bad / total if total else 0.0


def to_text(report: Report) -> str:
    """The report for a terminal."""
    most = max(report.histogram.values(), default=1)
    lines = [
        f"{report.documents:,} documents, {report.tokens:,} tokens; half have at most {report.median:,}, "
        f"the longest {report.longest:,}",
        f"{report.duplicates:,} duplicates ({report.duplicates / max(1, report.documents):.2%}); "
        f"{report.non_text:.3%} of the characters are no text",
    ]
    lines += [f"{span:>15} {count:>12,} {'█' * round(40 * count / most)}" for span, count in report.histogram.items()]
    lines += [f"window {n}: {text!r}" for n, text in enumerate(report.windows, 1)]
    return "\n".join(lines)


def write(report: Report, folder: Path) -> None:
    """``report.json`` beside the files."""
    with replace_file(folder / "report.json") as file:
        file.write(json.dumps(asdict(report), indent=1, ensure_ascii=False).encode("utf-8", "replace"))


def draw(report: Report, folder: Path) -> Path:
    """A picture of the lengths: ``report.png`` with matplotlib where it is installed, else ``report.svg``."""
    title = f"{report.documents:,} documents, {report.tokens:,} tokens"
    try:
        from matplotlib.figure import Figure
    except ImportError:
        path = folder / "report.svg"
        path.write_text(to_svg(report.histogram, title), encoding="utf-8")
        return path
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.bar(list(report.histogram), list(report.histogram.values()), color="#3465a4")
    axes.set(title=title, xlabel="tokens in a document", ylabel="documents")
    axes.tick_params("x", rotation=60, labelsize=8)
    path = folder / "report.png"
    figure.savefig(path, dpi=120)
    return path


def to_svg(histogram: dict[str, int], title: str) -> str:
    """A bar for each entry, with its number."""
    most, row = max(histogram.values(), default=1), 22
    height = 40 + row * len(histogram)
    bars = []
    for n, (span, count) in enumerate(histogram.items()):
        y, width = 36 + row * n, 380 * count / most
        bars.append(f'<text x="110" y="{y + 13}" text-anchor="end">{escape(span)}</text>')
        bars.append(f'<rect x="118" y="{y}" width="{width:.1f}" height="16" fill="#3465a4"/>')
        bars.append(f'<text x="{124 + width:.1f}" y="{y + 13}">{count:,}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="600" height="{height}" font-family="sans-serif" '
        f'font-size="12"><text x="10" y="20" font-size="14">{escape(title)}; by tokens in a document</text>'
        f"{''.join(bars)}</svg>\n"
    )


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
