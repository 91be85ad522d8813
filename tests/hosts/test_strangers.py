"""Connections from others than linked peers: to every port that a host has open."""

from __future__ import annotations

import contextlib
import os
import random
import re
import resource
import socket
import time
from collections.abc import Iterator

import pytest

from llm_datadist import CacheKey, LLMRole
from llm_datadist.transports import rendezvous, tcp
from tests import datadist_member as dd
from tests.hosts.instances import ANOTHER_DECODER, LINKED, MIB, PORT, PROMPT, Apart, init, link, link_apart
from tests.hosts.network import Host, Network, wait_until
from tests.integration.test_links import links
from tests.integration.test_transfer import addresses

LONGEST_WAIT_S = 30.0  # for a host to hang up on somebody who says nothing


@pytest.fixture
def apart(network: Network) -> Apart:
    return link_apart(network, pool_bytes=100 * MIB)


def open_ports(host: Host) -> list[int]:
    """Ports of TCP on which somebody listens at a host."""
    return sorted({int(port) for port in re.findall(r"\S+:(\d+)\s+\S+:\*", host.namespace.run("ss", "-Hltn"))})


def descriptors(_: dd.State) -> int:
    return len(os.listdir("/proc/self/fd"))


def threads(_: dd.State) -> int:
    return len(os.listdir("/proc/self/task"))


def say(address: str, port: int, data: bytes) -> None:
    """Connect, say something, and leave; the other side may hang up first."""
    with contextlib.suppress(ConnectionError), socket.create_connection((address, port), 5) as connection:
        connection.sendall(data)


def noise(seed: int) -> Iterator[bytes]:
    """What a stranger may say: nothing, a little, much, and what looks like the lengths of something huge."""
    chosen = random.Random(seed)
    yield b""
    for nbytes in (1, 15, 16, 17, 64, 1000, 100_000):
        yield chosen.randbytes(nbytes)
        yield bytes(nbytes)
        yield b"\xff" * nbytes
    yield from (chosen.randbytes(chosen.randint(1, 200)) for _ in range(100))
    for purpose in (tcp.LINK, tcp.FORWARD, tcp.REVERSE, b"?"):
        yield tcp.preamble(chosen.randbytes(rendezvous.TOKEN_BYTES), purpose) + chosen.randbytes(200)


def test_the_data_port_is_open(apart: Apart) -> None:
    """What the other tests talk to is there."""
    assert PORT in open_ports(apart.prompt_host)
    assert len(open_ports(apart.prompt_host)) + len(open_ports(apart.decoder_host)) >= 2


def test_noise_changes_nothing(apart: Apart) -> None:
    stranger = apart.network.add_host("stranger")
    cache = apart.offer(7, 3)
    before = {member: member.call(descriptors) for member in (apart.prompt, apart.decoder)}
    for host in (apart.prompt_host, apart.decoder_host):
        for port in open_ports(host):
            for data in noise(port):
                stranger.namespace.call(say, host.ipv4, port, data)
    apart.assert_works(1)
    assert [state for _, state, _ in apart.prompt.call(links)] == ["LINKED"]
    assert apart.prompt.call(dd.read, cache, 1) == dd.payload(3, 1, 4096).tobytes()
    apart.pull_and_compare(7, 3)
    for member, count in before.items():
        wait_until(lambda: member.call(descriptors) <= count + 4, f"descriptors given back by {member.name}")  # noqa: B023


def test_noise_from_the_hosts_of_the_peers(apart: Apart) -> None:
    """The right address is not enough."""
    mine = apart.decoder.call(dd.allocate, 2, (1, 4096))
    apart.decoder.call(dd.fill, mine, 5)
    addrs = apart.decoder.call(addresses, mine)
    for host, other in ((apart.prompt_host, apart.decoder_host), (apart.decoder_host, apart.prompt_host)):
        for port in open_ports(host):
            for data in [*noise(port), b"".join(address.to_bytes(8, "little") for address in addrs) * 100]:
                other.namespace.call(say, host.ipv4, port, data)
    assert apart.decoder.call(dd.read, mine, 0) == dd.payload(5, 0, 4096).tobytes()
    apart.assert_works(1)


def test_silent_strangers_hold_nobody_up(apart: Apart) -> None:
    """Who connects and says nothing, or half a word, is forgotten; others are served meanwhile."""
    stranger = apart.network.add_host("stranger")
    before = apart.prompt.call(descriptors)
    with contextlib.ExitStack() as held:
        for port in set(open_ports(apart.prompt_host)) - {PORT}:
            for number in range(100):
                connection = stranger.namespace.call(socket.create_connection, (apart.prompt_host.ipv4, port), 5)
                held.enter_context(connection)
                connection.sendall(b"x" * (number % 16))
        apart.assert_works(1)
        assert apart.unlink() == apart.link()
        apart.assert_works(2)
        other = apart.with_another_decoder(apart.network.add_host("other"))
        other.assert_works(3)
        wait_until(lambda: apart.prompt.call(descriptors) < before + 50, "end of what strangers hold", LONGEST_WAIT_S)
    apart.assert_works(4)


def limit_descriptors(_: dd.State, most: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def seconds_of_processor(_: dd.State) -> float:
    return time.process_time()


def test_more_strangers_than_descriptors(apart: Apart) -> None:
    """They cost the prompt neither its links nor its processor, and newcomers are served when they are gone."""
    stranger = apart.network.add_host("stranger")
    apart.prompt.call(limit_descriptors, apart.prompt.call(descriptors) + 60)
    (port,) = set(open_ports(apart.prompt_host)) - {PORT}
    apart.offer(1, 1)
    with contextlib.ExitStack() as held:
        before = apart.prompt.call(seconds_of_processor)
        for _ in range(200):  # more than fit into the queue of the listener, too
            connection = held.enter_context(stranger.namespace.call(socket.socket))
            connection.setblocking(False)
            connection.connect_ex((apart.prompt_host.ipv4, port))
        apart.pull_and_compare(1, 1)
        other = apart.network.add_host("other").start("another decoder")
        other.call(init, LLMRole.DECODER, ANOTHER_DECODER)
        address = apart.prompt_host.ipv4
        wait_until(lambda: other.call(link, PROMPT, address, PORT, 3000) == LINKED, "link", LONGEST_WAIT_S)
        assert apart.prompt.call(seconds_of_processor) - before < 1.5, "it waits, it does not spin"
    apart.assert_works(2)


def test_strangers_during_pulls(apart: Apart) -> None:
    """Noise on all ports while bytes move: they are the right ones."""
    stranger = apart.network.add_host("stranger")
    for req_id in range(1, 9):
        apart.offer(req_id, req_id, 2 * MIB)
    ports = open_ports(apart.prompt_host)
    for req_id in range(1, 9):
        mine = apart.decoder.call(dd.allocate, 2, (1, 2 * MIB))
        pulling = apart.decoder.start(dd.pull_cache, CacheKey(PROMPT, req_id), mine)
        for port in ports:
            for data in list(noise(req_id))[:20]:
                stranger.namespace.call(say, apart.prompt_host.ipv4, port, data)
        pulling.result()
        for tensor in range(2):
            assert apart.decoder.call(dd.read, mine, tensor) == dd.payload(req_id, tensor, 2 * MIB).tobytes()
        apart.decoder.call(dd.deallocate, mine)
