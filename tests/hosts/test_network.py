"""The hosts themselves: what they see of each other, and what is left of them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.hosts.network import Host, Network, wait_until
from tests.hosts.wire import Quality

PORT = 26000
MIB = 1 << 20


def echo(state: dict[str, Any]) -> None:
    """Send back what comes, to one peer at a time, over either version of IP."""
    listener = socket.create_server(("::", PORT), family=socket.AF_INET6, dualstack_ipv6=True)

    def serve() -> None:
        while True:
            connection, _ = listener.accept()
            with connection:
                while data := connection.recv(1 << 16):
                    connection.sendall(data)

    state["thread"] = threading.Thread(target=serve, daemon=True)
    state["thread"].start()


def ask(state: dict[str, Any], address: str, data: bytes = b"?", timeout_s: float = 30.0) -> tuple[bytes, float]:
    """Give what an echo answers, and the seconds of the round trip without the set-up of the connection."""
    with socket.create_connection((address, PORT), timeout_s) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        started = time.monotonic()
        sender = threading.Thread(target=connection.sendall, args=(data,))
        sender.start()
        answer = b""
        while len(answer) < len(data):
            answer += connection.recv(1 << 20)
        sender.join()
        return answer, time.monotonic() - started


def reaches(state: dict[str, Any], address: str) -> bool:
    try:
        return ask(state, address, timeout_s=0.5)[0] == b"?"
    except OSError:
        return False


def test_hosts_reach_each_other_by_address_and_by_name(network: Network) -> None:
    left, right = network.add_host("left"), network.add_host("right")
    left.start("echo").call(echo)
    asking = right.start("asking")
    for address in (left.ipv4, left.ipv6, "left", "left-v6"):
        assert asking.call(reaches, address), address
    assert not asking.call(reaches, "127.0.0.1"), "the loopback is another one"
    assert not asking.call(reaches, right.ipv4)


def test_the_process_of_the_test_is_on_none_of_them(network: Network) -> None:
    left = network.add_host("left")
    left.start("echo").call(echo)
    assert not reaches({}, left.ipv4)
    assert left.namespace.call(reaches, {}, left.ipv4), "a thread may visit it"
    assert not reaches({}, left.ipv4)


CUTS: dict[str, tuple[Callable[[Host, Host], None], Callable[[Host, Host], None]]] = {
    "dropped": (lambda one, other: one.ignore(other), lambda one, other: one.heed()),
    "unplugged": (lambda one, other: one.unplug(), lambda one, other: one.plug()),
    "down": (lambda one, other: one.take_down(), lambda one, other: one.take_up()),
}


@pytest.mark.parametrize("way", CUTS)
def test_a_cut_and_its_end(network: Network, way: str) -> None:
    cut, heal = CUTS[way]
    left, right, other = (network.add_host(name) for name in ("left", "right", "other"))
    left.start("echo").call(echo)
    asking, third = right.start("asking"), other.start("third")
    cut(left, right)
    for address in (left.ipv4, left.ipv6):
        assert not asking.call(reaches, address)
        assert third.call(reaches, address) is (way == "dropped")
    heal(left, right)
    for address in (left.ipv4, left.ipv6):
        wait_until(lambda address=address: asking.call(reaches, address), f"way to {address}")


def test_a_host_that_vanishes_and_comes_back(network: Network) -> None:
    left, right = network.add_host("left"), network.add_host("right")
    member = left.start("echo")
    member.call(echo)
    asking = right.start("asking")
    assert asking.call(reaches, left.ipv4)
    left.vanish()
    assert member.exitcode is not None
    assert not asking.call(reaches, left.ipv4)
    left.come_back()
    left.start("echo again").call(echo)
    for address in (left.ipv4, left.ipv6):
        wait_until(lambda address=address: asking.call(reaches, address), f"way to {address}")


def test_a_delay_and_losses(network: Network) -> None:
    near, far = network.add_host("near"), network.add_host("far", Quality(delay_s=0.02))
    lossy = network.add_host("lossy", Quality(loss=0.05))
    near.start("echo").call(echo)
    asking, unlucky = far.start("asking"), lossy.start("unlucky")
    assert asking.call(ask, near.ipv4)[1] >= 0.04, "there and back"
    data = os.urandom(4 * MIB)
    assert unlucky.call(ask, near.ipv6, data)[0] == data
    assert lossy.carried().lost > 50
    assert far.carried().lost == 0


def test_a_limit(network: Network) -> None:
    left, right = network.add_host("left"), network.add_host("right")
    left.start("echo").call(echo)
    asking = right.start("asking")
    before = right.received_bytes()
    data = os.urandom(2 * MIB)
    left.limit(4 * MIB)
    answer, seconds = asking.call(ask, left.ipv4, data)
    assert answer == data
    assert 0.4 < seconds < 10
    right.wait_until_received(2 * MIB, before)
    left.unlimit()
    assert asking.call(ask, left.ipv4, data)[0] == data


PROGRAM = """
import time
from tests.hosts.network import Network
from tests.hosts.wire import Quality

with Network() as network:
    near = network.add_host("near").start("near member")
    far = network.add_host("far", Quality(delay_s=0.02)).start("far member")
    assert near.call(len) == far.call(len) == 0  # from here on they are where they belong
    print(near.pid, far.pid, flush=True)
    time.sleep(60)
"""


@pytest.mark.usefixtures("network")
def test_nothing_is_left_when_the_test_is_killed() -> None:
    """SIGKILL leaves no chance to clean up; processes end with the one that started them, and namespaces with them."""
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True, cwd=root) as program:
        assert program.stdout is not None
        spaces = {os.stat(f"/proc/{pid}/ns/net").st_ino for pid in program.stdout.readline().split()}
        assert len(spaces - {os.stat("/proc/self/ns/net").st_ino}) == 2
        program.kill()
    wait_until(lambda: not spaces & living_namespaces(), "end of the namespaces")


def living_namespaces() -> set[int]:
    """Network namespaces that some process of this system is in, by number."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                found.add(os.stat(entry / "ns" / "net").st_ino)
            except OSError:  # it ended meanwhile
                continue
    return found
