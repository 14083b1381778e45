"""``tokenize``: a corpus to sharded token files, once, for runs that read them as ``data.corpus = "tokens"``."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from moe_dtensor.config.command_line import Parser
from moe_dtensor.config.errors import ConfigError
from moe_dtensor.config.schema import Config

HELP = "tokenise the corpus of a config into sharded files, once (--report tells what is in them)"
SHARD_TOKENS = 1 << 28
TELL_SECONDS = 5.0  # between lines where there is no terminal


def main(argv: list[str]) -> int:
    """Write the files of both splits (of each source); 0 when they are whole."""
    parser = Parser("tokenize", HELP)
    parser.add_argument("--output", metavar="DIR", required=True, help="folder of the files; goes on where it stopped")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes that tokenise (default: 1)")
    parser.add_argument(
        "--shard-tokens",
        type=int,
        default=SHARD_TOKENS,
        metavar="M",
        help=f"tokens in a file (default: {SHARD_TOKENS})",
    )
    parser.add_argument("--report", action="store_true", help="also tell lengths, duplicates, non-text and samples")
    options, config = parser.load(argv)
    for name, value in (("--workers", options.workers), ("--shard-tokens", options.shard_tokens)):
        if value < 1:
            raise ConfigError(f"{name} {value} is too small.", f"Give {name} 1 or more.")

    from moe_dtensor.data.corpus import Mixture, build_corpus

    corpus = build_corpus(config)
    folder = Path(options.output)
    each = zip(corpus.names, corpus.corpora, strict=True) if isinstance(corpus, Mixture) else [("", corpus)]
    for name, one in each:
        tokenize(one, folder / name, options.workers, options.shard_tokens)
        if options.report:
            report(config, one, folder / name)
    return 0


def tokenize(corpus: Any, folder: Path, workers: int, shard_tokens: int) -> None:
    """One corpus into one folder, with a line at the end."""
    from moe_dtensor.data.shards import write_shards
    from moe_dtensor.data.tokens import RandomCorpus

    if isinstance(corpus, RandomCorpus):
        raise ConfigError("data.corpus = 'random' has no end, and so no files.", "Choose a corpus with documents.")
    if getattr(corpus, "marked", False):
        raise ConfigError(
            "data.corpus = 'conversations' goes by what the assistant says, which token files do not hold.",
            "Train on the conversations themselves: they are tokenised once, into a cache.",
        )
    progress = Progress()
    started = time.perf_counter()
    written = write_shards(corpus, folder, workers, shard_tokens, progress.tell)
    progress.close()
    seconds = time.perf_counter() - started
    tokens = {split: sum(h.tokens for h in headers) for split, headers in written.items()}
    told = "; ".join(
        f"{split}: {sum(h.documents for h in headers):,} documents, {tokens[split]:,} tokens in {len(headers)} files"
        for split, headers in written.items()
    )
    made = progress.made
    rate = f"; {made:,} tokens now, in {seconds:.1f} s ({made / seconds:,.0f} a second)" if made else "; was whole"
    print(f"{folder}: {told}{rate}")


class Progress:
    """One live line on a terminal, else a line every few seconds: tokens, rate, what is left."""

    def __init__(self) -> None:
        self.made_in: dict[str, int] = {}
        self._share = 0.0
        self._start = self._last = time.perf_counter()
        self._live = sys.stderr.isatty()

    @property
    def made(self) -> int:
        """Tokens made so far by this call."""
        return sum(self.made_in.values())

    def tell(self, done: Any) -> None:
        """Show how far it is."""
        now = time.perf_counter()
        if done.split not in self.made_in:
            self._start, self._share = now, done.share or 0.0
        self.made_in[done.split] = done.made
        if now - self._last < (0.2 if self._live else TELL_SECONDS):
            return
        self._last = now
        line = f"{done.split}: {done.documents:,} documents, {done.tokens:,} tokens"
        if now - self._start > 0.1:
            line += f", {done.made / (now - self._start):,.0f} a second"
        if done.share is not None and done.share > self._share:
            left = (now - self._start) * (1 - done.share) / (done.share - self._share)
            line += f", {done.share:.0%}, {left // 60:.0f} min {left % 60:.0f} s left"
        print(f"\r\x1b[K{line}" if self._live else line, end="" if self._live else "\n", file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the live line."""
        if self._live and self.made_in:
            print(file=sys.stderr)


def report(config: Config, corpus: Any, folder: Path) -> None:
    """What is in the files: printed, as report.json, and as a picture."""
    from moe_dtensor.data.report import draw, survey, to_text, write

    found = survey(folder, corpus.tokenizer, config.training.seq_len)
    print(to_text(found))
    write(found, folder)
    print(f"picture: {draw(found, folder)}")
