"""Streams beside training: a bounded queue, a shared tokeniser, downloads that fail."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch.distributed import DistNetworkError, HashStore, TCPStore

from moe_dtensor.config.errors import ConfigError, RunError
from moe_dtensor.data import Loader, build_corpus, hub
from moe_dtensor.data.host import HostChunks, OtherHosts, other_hosts
from moe_dtensor.data.hub import StreamedDocuments
from moe_dtensor.data.loader import DEPTH, Prefetcher


@pytest.fixture
def config(make_config, tmp_path):
    lines = [json.dumps({"text": f"{i} " * (1 + i % 7)}) for i in range(400)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    return make_config(corpus="datasets", path=str(tmp_path / "a.jsonl"))


def test_batches_read_ahead_are_the_loaders_and_resume_where_they_were_taken(config) -> None:
    plain, ahead = Loader(config, build_corpus(config)), Prefetcher(Loader(config, build_corpus(config)), 1, 2)
    for _ in range(20):
        assert torch.equal(ahead.next().tokens_BS, plain.next_batch(2, 4).tokens_BS)
        assert ahead.state_dict() == plain.state_dict()
    state = ahead.state_dict()
    ahead.next()
    again = Prefetcher(Loader(config, build_corpus(config)), 0, 1)
    again.load_state_dict(state)
    ahead.load_state_dict(state)
    for _ in range(5):
        expected = plain.next_batch(0, 4).tokens_BS
        assert torch.equal(again.next().tokens_BS, expected)
        assert torch.equal(ahead.next().tokens_BS, expected[2:])
    again.close()
    ahead.close()


def test_the_queue_is_bounded_and_the_wait_is_told(config) -> None:
    loader = Loader(config, build_corpus(config))
    read, slow = loader.next_batch, 0.0

    def next_batch(first: int, last: int):
        time.sleep(slow)
        return read(first, last)

    loader.next_batch = next_batch  # type: ignore[method-assign]
    ahead = Prefetcher(loader, 0, 1)
    ahead.next()
    time.sleep(0.3)
    assert loader.sequences // 4 <= 1 + DEPTH + 1  # taken, waiting, in hand
    slow = 0.2
    waits = [ahead.next() and ahead.wait_seconds for _ in range(DEPTH + 4)]
    assert waits[0] < 0.05 < 0.15 < waits[-1]
    ahead.close()


def test_what_reading_raises_is_raised_where_the_batch_is_taken(config, tmp_path) -> None:
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write("\n{oops\n")
    ahead = Prefetcher(Loader(config, build_corpus(config)), 0, 1)

    def read_on() -> None:
        for _ in range(1000):
            ahead.next()

    with pytest.raises(ConfigError, match=r"a\.jsonl:401"):
        read_on()


class Flaky:
    """A streaming dataset whose connection breaks at some records, each once or for ever."""

    def __init__(self, breaks: set[int], for_ever: bool = False) -> None:
        self.breaks, self.for_ever, self.place = breaks, for_ever, 0

    def __iter__(self):
        while self.place < 50:
            if self.place in self.breaks:
                if not self.for_ever:
                    self.breaks.discard(self.place)
                raise ConnectionError("reset by peer")
            self.place += 1
            yield {"text": f"record {self.place - 1}"}

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]


def test_a_failed_download_is_tried_again_then_ends_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(hub.time, "sleep", pauses.append)
    documents = StreamedDocuments(Flaky({0, 7, 30}), "some/name", "text", None)
    assert list(documents) == [f"record {i}" for i in range(50)]
    assert pauses == [1.0] * 3
    documents = StreamedDocuments(Flaky({7}, for_ever=True), "some/name", "text", None)
    with pytest.raises(RunError, match=r"(?s)'some/name' could not be read on after 5 more tries.*reset by peer"):
        list(documents)
    assert pauses[3:] == [1.0, 2.0, 4.0, 8.0, 16.0]


def _tokenise(rank: int, name: str, results) -> None:
    chunks = HostChunks(rank, 2, name)
    got = []
    for i in range(40):
        got.append(chunks.get(f"chunk {i}", lambda i=i: np.full(100, i)))
        time.sleep(0.001)
    results.put((rank, chunks.made, [int(x[0]) for x in got]))
    time.sleep(0.5)


def test_ranks_of_a_host_share_the_work() -> None:
    """Together they tokenise little more than the stream once."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    name = f"{os.getpid()}-{time.time_ns()}"
    ranks = [context.Process(target=_tokenise, args=(rank, name, results)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    found = [results.get(timeout=60) for _ in ranks]
    for process in ranks:
        process.join()
    assert all(values == list(range(40)) for _, _, values in found)
    assert sum(made for _, made, _ in found) < 60
    assert all(made > 5 for _, made, _ in found)
    HostChunks(0, 2, name).close()


def test_a_chunk_that_never_comes_is_made_by_who_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_dtensor.data.host.PATIENCE", 0.05)
    chunks = HostChunks(0, 2, f"{os.getpid()}-alone")
    assert [int(chunks.get(str(i), lambda i=i: np.array([i]))[0]) for i in range(20)] == list(range(20))
    assert chunks.made == 20
    assert chunks.folder is None  # once without an answer is enough


def test_hosts_share_the_work() -> None:
    """Each of two hosts tokenises about a half, and both have all."""
    store = HashStore()
    made: dict[int, int] = {}

    def tokenise(host: int) -> list[int]:
        chunks = HostChunks(0, 1, f"{os.getpid()}-far", lambda: OtherHosts(store, host, 2))
        got = [int(chunks.get(f"chunk {i}", lambda i=i: np.full(1000, i, "<u2"))[0]) for i in range(40)]
        made[host] = chunks.made
        return got

    with ThreadPoolExecutor(2) as hosts:
        assert list(hosts.map(tokenise, (0, 1))) == [list(range(40))] * 2
    assert made[0] + made[1] == 40
    assert min(made.values()) > 10


def _of_a_host(host: int, port: int, results) -> None:
    os.environ.update(GROUP_WORLD_SIZE="2", GROUP_RANK=str(host), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    chunks = HostChunks(0, 1, "far", lambda: other_hosts("stream"))
    got = [int(chunks.get(f"{i}", lambda i=i: np.full(1000, i, "<u2"))[0]) for i in range(20)]
    results.put((chunks.made, chunks.others().found, got))


def test_hosts_meet_by_the_store_of_the_ranks() -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    hosts = [context.Process(target=_of_a_host, args=(host, store.port, results)) for host in (0, 1)]
    for process in hosts:
        process.start()
    found = [results.get(timeout=60) for _ in hosts]
    for process in hosts:
        process.join()
    assert all(got == list(range(20)) for _, _, got in found)
    assert [made + others for made, others, _ in found] == [20, 20]
    assert sum(made for made, _, _ in found) == 20


def test_what_another_host_no_longer_holds_is_made(monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    monkeypatch.setattr("moe_dtensor.data.host.PATIENCE", 0.05)
    monkeypatch.setattr("moe_dtensor.data.host.KEPT_BYTES", 10)
    first, second = (OtherHosts(HashStore(), host, 2) for host in (0, 1))
    second.store = first.store
    for i in range(3):
        first.offer(f"{i}", np.arange(3, dtype="<u2"))
    assert second.find("0") is None
    assert not caplog.messages
    np.testing.assert_array_equal(second.find("2"), np.arange(3))
    assert second.find("3") is None
    assert second.find("4") is None
    told = "another host's tokens do not come (none within 0.05 s); this one tokenises what it needs itself"
    assert caplog.messages == [told]


class Broken(HashStore):
    def check(self, *unused: object) -> bool:
        raise DistNetworkError("the connection was reset")

    set = check


def test_a_store_that_is_gone_ends_no_run(caplog) -> None:
    chunks = HostChunks(0, 1, f"{os.getpid()}-gone", lambda: OtherHosts(Broken(), 0, 2))
    assert [int(chunks.get(f"{i}", lambda i=i: np.array([i]))[0]) for i in range(20)] == list(range(20))
    (told,) = caplog.messages
    assert "the connection was reset" in told
