"""Hosts agree on what they run before it starts, and every host hears the same sentence if they do not."""

from __future__ import annotations

import importlib.util
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def meet() -> ModuleType:
    spec = importlib.util.spec_from_file_location("meet", ROOT / "scripts/meet.py")
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


FACTS = {"code": "a1", "config": "b2"}


def together(
    meet: ModuleType, port: int, facts: list[dict[str, str]], seconds: float = 10.0, hosts: int = 0
) -> list[Any]:
    """Each host's number, or what it is told."""

    def run(i: int) -> Any:
        deadline = time.monotonic() + seconds
        try:
            if i == 0:
                return meet.serve(port, hosts or len(facts), facts[0], deadline, "127.0.0.1")
            return meet.join("127.0.0.1", port, facts[i], deadline)
        except meet.MeetingError as error:
            return str(error)

    with ThreadPoolExecutor(len(facts)) as threads:
        return list(threads.map(run, range(len(facts))))


def test_hosts_are_numbered(meet: ModuleType, port: int) -> None:
    first, *others = together(meet, port, [FACTS] * 4)
    assert first == 0
    assert sorted(others) == [1, 2, 3]
    # torchrun's store takes the port next.
    socket.create_server(("", port)).close()


def test_a_difference_is_told_to_all(meet: ModuleType, port: int) -> None:
    told = together(meet, port, [FACTS, FACTS, FACTS | {"code": "c3"}])
    assert len(set(told)) == 1
    assert told[0].startswith("the hosts differ in code: 127.0.0.1 has a1, 127.0.0.1 has c3.")


def test_a_host_that_does_not_come_is_told(meet: ModuleType, port: int) -> None:
    told = together(meet, port, [FACTS, FACTS], seconds=1.0, hosts=3)
    assert told[0] == told[1]
    assert told[0].startswith("2 of 3 hosts came: 127.0.0.1, 127.0.0.1. Start the others")


def test_nothing_listens(meet: ModuleType, port: int) -> None:
    with pytest.raises(meet.MeetingError, match=r"nothing listens there: is run_train\.sh started on it"):
        meet.join("127.0.0.1", port, FACTS, time.monotonic() + 0.2)


def test_something_else_listens(meet: ModuleType, port: int) -> None:
    with socket.create_server(("127.0.0.1", port)) as server, ThreadPoolExecutor(1) as threads:
        answer = threads.submit(meet.join, "127.0.0.1", port, FACTS, time.monotonic() + 5)
        server.accept()[0].close()
        with pytest.raises(meet.MeetingError, match="held by something else"):
            answer.result()
        with pytest.raises(meet.MeetingError, match="End what holds it"):
            meet.serve(port, 2, FACTS, time.monotonic() + 1, "127.0.0.1")


def test_endpoints(meet: ModuleType) -> None:
    assert meet.parse("node7:1234") == ("node7", 1234)
    assert meet.parse("node7") == ("node7", 29500)
    assert meet.parse("[fe80::1]:1234") == ("fe80::1", 1234)
    with pytest.raises(meet.MeetingError, match="Write host:port"):
        meet.parse("node7:http")
    with pytest.raises(meet.MeetingError, match=r"knows no host 'no\.such\.host\.invalid'"):
        meet.resolve("no.such.host.invalid", 1)


def test_which_addresses_are_here(meet: ModuleType) -> None:
    assert meet.is_here("127.0.0.1")
    assert not meet.is_here("192.0.2.7")
    assert meet.interface_of("127.0.0.1") == "lo"


def test_facts_tell_code_config_and_flags(meet: ModuleType, tmp_path: Path) -> None:
    config = tmp_path / "a.toml"
    config.write_text("[mesh]")
    facts = meet.gather_facts(config, "2", 4, ["--mesh.tp", "2"])
    config.write_text("[mesh]\ntp = 1")
    changed = meet.gather_facts(config, "2", 4, [])
    assert [key for key in facts if facts[key] != changed[key]] == ["config (CONFIG_FILE)", "flags"]
    assert facts["flags"] == "--mesh.tp 2"
