"""What a rank has of a run before its model: data read, folder held. Loads little: what is wrong is told soon."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_dtensor.checkpoint.folder import on_rank_0
from moe_dtensor.config.resolve import resolve
from moe_dtensor.config.schema import Config
from moe_dtensor.data import Corpus, Loader, build_corpus
from moe_dtensor.data.corpus import set_vocabulary
from moe_dtensor.data.hub import pin_revisions, reads_hub
from moe_dtensor.train.ranks import Ranks, start_ranks
from moe_dtensor.train.run_folder import RunFolder, kept_revisions, open_run_folder
from moe_dtensor.train.watch import Watch


@dataclass
class Opened:
    """A run that may begin, on this rank."""

    config: Config
    """Resolved, with the vocabulary's size."""
    device: torch.device
    corpus: Corpus
    folder: RunFolder
    loader: Loader | None
    """Of training; None where the run is finished."""
    watch: Watch

    def close(self) -> None:
        """Let go of the folder."""
        self.watch.close()
        self.folder.close()


def open_run(given: Config, ranks: Ranks) -> Opened:
    """Join the process group, read the data, check and hold the run's folder. Called by all ranks together.

    Args:
        given: checked, not resolved.
        ranks: of the run.

    Raises:
        Ended: the ranks agreed to end; all that one rank may meet is told once.
    """
    config = resolve(given, ranks.world_size)
    watch = Watch(ranks, config.comm.timeout_seconds)
    device = start_ranks(config, ranks)
    if reads_hub(config):
        given = ranks.agree(lambda: on_rank_0(lambda: pin_revisions(given, kept_revisions(config))))
        config = resolve(given, ranks.world_size)

    def read() -> tuple[Corpus, Config, str]:
        corpus = build_corpus(config)
        return corpus, set_vocabulary(config, corpus), corpus.fingerprint()

    corpus, config, fingerprint = ranks.agree(read)
    folder = ranks.agree(lambda: open_run_folder(config, fingerprint, given))
    opened = Opened(config, device, corpus, folder, None, watch)
    try:
        if folder.state != "finished":
            # A split that is too small, or has a record that is no text, is told here.
            opened.loader = ranks.agree(lambda: Loader(config, corpus))
    except BaseException:
        opened.close()
        raise
    return opened
