"""One rank from its start to its exit status: every way to end goes through here."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from moe_dtensor.config.errors import DONE, FAILED, PEER_LOST, WRONG, ConfigError, RunError, words
from moe_dtensor.config.schema import Config
from moe_dtensor.orphans import end_with_parent
from moe_dtensor.train.ranks import Ended, EndRequest, Ranks

_PEER_LOST = re.compile(
    r"Connection (closed|reset|refused)|Broken pipe|Socket (closed|error)|remote process exited|pair closure"
    r"|ncclRemoteError|ncclSystemError|recvBytes|sendBytes|failed to (recv|send)",
    re.IGNORECASE,
)


def run_rank(config: Config | ConfigError) -> int:
    """Train, or tell together with the other ranks why not; returns the exit status.

    Args:
        config: checked, not resolved; or what is wrong with it on this rank.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()
    ranks = Ranks()
    request = EndRequest()

    def run() -> int:
        request.listen()
        checked = ranks.agree(lambda: given(config))

        # Only now, step by step: a wrong config is told without waiting for the data, and these without the model.
        from moe_dtensor.train.opened import open_run

        opened = open_run(checked, ranks)

        from moe_dtensor.train.loop import train

        return train(opened, ranks, request)

    return status_of(run, ranks)


def given(config: Config | ConfigError) -> Config:
    """The config, or its error raised."""
    if isinstance(config, ConfigError):
        raise config
    return config


def status_of(run: Callable[[], int], ranks: Ranks) -> int:
    """The status that ``run()`` ends with; an error is printed by the rank that has it, once where several have it."""
    try:
        return run()
    except Ended as ended:
        if ended.message:
            tell_once(ranks, ended.message, ended.message)
        return ended.status
    except (ConfigError, RunError) as error:
        tell_once(ranks, words(error.problem, error.remedy, "" if error.common else ranks.where), error.problem)
        return WRONG if isinstance(error, ConfigError) else FAILED
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else DONE
    except Exception as error:
        if _is_peer_lost(error, ranks):
            return _end_as_lost(error, ranks)
        text = f"{type(error).__name__}: {error}"
        tell_once(ranks, f"{traceback.format_exc()}{words(text, where=ranks.where)}", text)
        return FAILED


def tell_once(ranks: Ranks, text: str, key: str) -> None:
    """Print ``text`` unless another rank has told an error of the same ``key``."""
    if ranks.claims(key):
        ranks.claims("lost")  # ranks that lose this one need not tell it
        tell(text)


def tell(text: str) -> None:
    """Print to stderr, which may be closed."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def _is_peer_lost(error: Exception, ranks: Ranks) -> bool:
    """Whether a collective failed because another rank is gone: that one, or the launcher, tells what happened."""
    return ranks.world_size > 1 and bool(_PEER_LOST.search(f"{type(error).__name__}: {error}"))


def _end_as_lost(error: Exception, ranks: Ranks) -> int:
    text = f"lost contact with another rank: {str(error).splitlines()[0][:200]}"
    file = os.environ.get("TORCHELASTIC_ERROR_FILE", "")
    if "MOE_DTENSOR_START" in os.environ and file:
        with contextlib.suppress(OSError):
            # Told by the launcher, if no rank has more to say; in the form that torchrun's agent reads.
            Path(file).write_text(json.dumps({"message": text, "timestamp": int(time.time())}), encoding="utf-8")
    else:
        tell_once(ranks, words(text, where=ranks.where), "lost")
    return PEER_LOST
