"""The hosts of a run find each other before torchrun starts, and agree on what they run. Standard library only.

    python scripts/meet.py ENDPOINT HOSTS --config F --ranks N [--timeout S] [-- --table.key value ...]

The host whose address ENDPOINT is waits there for the others; they tell it what they are about to run. If all say the
same, it numbers them, itself 0, the others by address. Printed for the shell: this host's number, the address to meet
at again, and the network interface that leads there. What goes wrong is one sentence on every host, and exit status 1.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import ipaddress
import json
import socket
import struct
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PORT = 29500
Facts = dict[str, str]


class MeetingError(Exception):
    """What every host is told."""


def main() -> int:
    """Meet; 0 with three words on standard output, or 1 with a sentence on standard error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("endpoint", help="host:port of one of the hosts")
    parser.add_argument("hosts", type=int)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--ranks", required=True, help="on each host")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds to wait for the others")
    options, flags = parser.parse_known_args()
    try:
        name, port = parse(options.endpoint)
        addresses = resolve(name, port)
        facts = gather_facts(options.config, options.ranks, options.hosts, [word for word in flags if word != "--"])
        here = [address for address in addresses if is_here(address)]
        deadline = time.monotonic() + options.timeout
        if here:
            own = next((address for address in here if not ipaddress.ip_address(address).is_loopback), None)
            own = own or own_address()
            say(f"{options.endpoint} is this machine ({own}): waiting for {options.hosts - 1} more")
            number = serve(port, options.hosts, facts, deadline, own)
            meet_at = own
        else:
            meet_at = addresses[0]
            own = own_address(meet_at)
            say(f"{options.endpoint} is another machine ({meet_at}), reached from {own}")
            number = join(meet_at, port, facts, deadline)
    except MeetingError as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    interface = interface_of(own)
    say(f"host {number} of {options.hosts}, address {own}, interface {interface or 'unknown'}")
    print(number, meet_at, port, interface)
    return 0


def say(text: str) -> None:
    """Progress, not for the shell."""
    print(text, file=sys.stderr, flush=True)


def parse(endpoint: str) -> tuple[str, int]:
    """``host``, ``host:port`` or ``[v6 address]:port``."""
    name, colon, port = endpoint.rpartition(":")
    if not colon or endpoint.endswith("]"):
        name, port = endpoint, str(PORT)
    if not port.isdigit() or not 0 < int(port) < 65536:
        raise MeetingError(f"RDZV_ENDPOINT = {endpoint}: {port!r} is no port. Write host:port.")
    return name.strip("[]"), int(port)


def resolve(name: str, port: int) -> list[str]:
    """The addresses of a host name, without doubles."""
    try:
        found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise MeetingError(f"RDZV_ENDPOINT: this machine knows no host {name!r} ({error}). Write an address.") from None
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def gather_facts(config: Path, ranks: str, hosts: int, flags: list[str]) -> Facts:
    """What must be equal on all hosts. Files are told by the start of their digest."""
    package = Path(__file__).resolve().parents[1] / "moe_dtensor"
    code = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        code.update(str(path.relative_to(package)).encode() + path.read_bytes())
    try:
        torch = version("torch")
    except PackageNotFoundError:
        torch = "none"
    return {
        "NNODES": str(hosts),
        "NGPU (ranks on a host)": ranks,
        "code (moe_dtensor/)": code.hexdigest()[:12],
        "config (CONFIG_FILE)": hashlib.sha256(config.read_bytes()).hexdigest()[:12],
        "flags": " ".join(flags) or "none",
        "torch": torch.split("+")[0],
    }


def is_here(address: str) -> bool:
    """Whether an address is one of this machine's: only those can be bound."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def own_address(toward: str = "") -> str:
    """This machine's address on the way to another, or to anywhere."""
    for target in [toward] if toward else ["192.0.2.1", "2001:db8::1"]:  # addresses for documentation: nothing is sent
        with socket.socket(socket.AF_INET6 if ":" in target else socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((target, 9))
                return str(probe.getsockname()[0])
            except OSError:
                continue
    addresses = [address for address in map(_address_of, _interfaces()) if address]
    return next((a for a in addresses if not ipaddress.ip_address(a).is_loopback), "127.0.0.1")


def interface_of(address: str) -> str:
    """The network interface that has an address; empty if that cannot be told."""
    if ":" in address:
        digits = ipaddress.ip_address(address.split("%")[0]).exploded.replace(":", "")
        table = Path("/proc/net/if_inet6")
        lines = table.read_text().splitlines() if table.is_file() else []
        return next((line.split()[-1] for line in lines if line.startswith(digits)), "")
    return next((name for name in _interfaces() if _address_of(name) == address), "")


def _interfaces() -> list[str]:
    return [name for _, name in socket.if_nameindex()]


def _address_of(interface: str) -> str:
    """The IPv4 address of an interface; empty without one."""
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe, 0x8915, struct.pack("256s", interface.encode()[:15]))  # SIOCGIFADDR
        except OSError:
            return ""
    return socket.inet_ntoa(answer[20:24])


def serve(port: int, hosts: int, facts: Facts, deadline: float, own: str) -> int:
    """Wait for the others, compare, number them; this host's number, 0."""
    try:
        server = socket.create_server(("", port), family=socket.AF_INET6 if ":" in own else socket.AF_INET)
    except OSError as error:
        raise MeetingError(
            f"port {port} of this machine cannot be used ({error}). End what holds it, or name another port."
        ) from None
    others: list[tuple[str, socket.socket, Facts]] = []
    # torchrun takes this port next: the listener closes first, and the others begin when their connections end.
    with contextlib.ExitStack() as connections, server:
        try:
            while len(others) < hosts - 1:
                server.settimeout(max(0.01, deadline - time.monotonic()))
                try:
                    connection, (address, *_) = server.accept()
                except TimeoutError:
                    came = ", ".join([own, *(address for address, *_ in others)])
                    raise MeetingError(
                        f"{1 + len(others)} of {hosts} hosts came: {came}. Start the others with the same "
                        f"RDZV_ENDPOINT; they must reach port {port} of {own}."
                    ) from None
                connections.enter_context(connection)
                # Whoever speaks otherwise is not one of ours.
                with contextlib.suppress(OSError, ValueError):
                    others.append((address, connection, receive(connection, 10.0)))
                    say(f"{address} is here, {1 + len(others)} of {hosts}")
            compare([(own, facts), *((address, theirs) for address, _, theirs in others)])
        except MeetingError as failure:
            for _, connection, _ in others:
                send(connection, {"error": str(failure)})
            raise
        others.sort(key=lambda other: int(ipaddress.ip_address(other[0])))
        for number, (_, connection, _) in enumerate(others, 1):
            send(connection, {"number": number})
    return 0


def compare(hosts: list[tuple[str, Facts]]) -> None:
    """Raise MeetingError unless all hosts told the same."""
    (first, facts), *others = hosts
    for key, value in facts.items():
        for address, theirs in others:
            if theirs.get(key) != value:
                raise MeetingError(
                    f"the hosts differ in {key}: {first} has {value}, {address} has {theirs.get(key)}. "
                    "Start all with the same."
                )


def join(address: str, port: int, facts: Facts, deadline: float) -> int:
    """Tell the first host what is run here; the number it gives."""
    while True:
        try:
            connection = socket.create_connection((address, port), timeout=min(5.0, deadline - time.monotonic()))
            break
        except ValueError:
            error: OSError = TimeoutError()
        except OSError as problem:
            error = problem
        if time.monotonic() + 0.5 > deadline:
            why = (
                "nothing listens there: is run_train.sh started on it, with the same RDZV_ENDPOINT?"
                if isinstance(error, ConnectionRefusedError)
                else f"no answer ({error or 'timed out'}): is the address right, and the port open in its firewall?"
            )
            raise MeetingError(f"{address} port {port} was not reached; {why}")
        time.sleep(0.5)
    with connection:
        try:
            send(connection, facts)
            answer = receive(connection, max(1.0, deadline - time.monotonic()) + 10.0)
        except (OSError, ValueError):
            raise MeetingError(
                f"{address} port {port} is held by something else, or that host left. End what is left of earlier "
                "runs on all hosts, then start all again."
            ) from None
        if "error" in answer:
            raise MeetingError(answer["error"])
        connection.recv(1)
    return int(answer["number"])


def send(connection: socket.socket, message: dict[str, Any]) -> None:
    """A line of JSON; a host that is gone hears nothing."""
    with contextlib.suppress(OSError):
        connection.sendall(json.dumps(message).encode() + b"\n")


def receive(connection: socket.socket, timeout: float) -> dict[str, Any]:
    """The other side's line; ValueError or OSError if none comes."""
    connection.settimeout(timeout)
    with connection.makefile("rb") as lines:
        message = json.loads(lines.readline(65536))
    if not isinstance(message, dict):
        raise ValueError("not a message")
    return message


if __name__ == "__main__":
    sys.exit(main())
