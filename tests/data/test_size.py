"""Token files as large as a run's: sparse on disk, so that only what is read costs anything."""

from __future__ import annotations

import hashlib
import json
import resource
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_dtensor.config.schema import Config, Source
from moe_dtensor.data import Loader, build_corpus
from moe_dtensor.data.token_files import Header

SECONDS, MEGABYTES, SEEK = 2.0, 100, 0.05
BILLION = 10**9


def write_sparse(path: Path, tokens: int) -> None:
    """A token file with a header; all its ids are 0 and take no space."""
    checksum = hashlib.blake2b(bytes(2 * tokens), digest_size=16).hexdigest() if tokens < 10**7 else "0" * 32
    header = Header("<u2", tokens, 1, 257, 256, "bytes-257", checksum).to_bytes()
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + 2 * tokens)


def seek(loader: Loader, batches: int) -> None:
    """As a resumed run does: to the place after so many batches."""
    sequences = batches * loader.batch_size
    state: dict[str, Any] = loader.windows.state() | {"position": sequences}
    loader.load_state_dict({"position": json.dumps({"windows": state, "sequences": sequences})})


def open_and_seek(config: Config) -> tuple[float, float, float]:
    """Seconds to open, megabytes more than before, the median of seconds to a step's batch."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    loader = Loader(config, build_corpus(config))
    seconds, seeks = time.perf_counter() - start, []
    for step in np.random.default_rng(0).integers(1, 10**7, size=21):
        start = time.perf_counter()
        seek(loader, int(step))
        loader.next_batch(0, 4)
        seeks.append(time.perf_counter() - start)
    return seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, float(np.median(seeks))


@pytest.mark.full
@pytest.mark.parametrize(("files", "tokens"), [(2, 3 * BILLION), (1000, 10**6)])
def test_large_files_open_at_once(make_config, tmp_path: Path, files: int, tokens: int) -> None:
    (tmp_path / "shards").mkdir()
    for i in range(files):
        write_sparse(tmp_path / "shards" / f"{i:04}.tokens", tokens)
    seconds, megabytes, to_a_step = open_and_seek(make_config(corpus="tokens", path=str(tmp_path / "shards")))
    print(f"{files} files of {tokens:,} ids: open {seconds:.2f} s, {megabytes:.0f} MB, a step {1e3 * to_a_step:.1f} ms")
    assert seconds < SECONDS
    assert megabytes < MEGABYTES
    assert to_a_step < SEEK


@pytest.mark.full
def test_a_step_of_a_mixture_is_found_at_once(make_config, tmp_path: Path) -> None:
    write_sparse(tmp_path / "a.tokens", 3 * BILLION)
    write_sparse(tmp_path / "b.tokens", 3 * BILLION)
    config = make_config()
    sources = [{"name": n, "corpus": "tokens", "path": str(tmp_path / f"{n}.tokens"), "weight": 1} for n in "ab"]
    config = replace(
        config,
        data=replace(config.data, sources=tuple(Source(**source) for source in sources)),
        training=replace(config.training, steps=10**7),
    )
    seconds, megabytes, to_a_step = open_and_seek(config)
    print(f"a mixture: open {seconds:.2f} s, {megabytes:.0f} MB, a step {1e3 * to_a_step:.1f} ms")
    assert seconds < SECONDS
    assert megabytes < MEGABYTES
    assert to_a_step < SEEK
