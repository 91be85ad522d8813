"""Hosts on one switch, made of network namespaces: cables are veth pairs, the switch is a bridge."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from llm_datadist.cluster.local import LocalWorker
from tests import processes
from tests.hosts import wire
from tests.hosts.namespace import Namespace, check, enter, unshare
from tests.processes import Member
from tests.warm_group import process_group

DEVICE = "eth0"
MTU = 1500
PATIENCE_S = 20.0
_PAUSE_S = 0.01

_CLONE_NEWNS = 0x00020000  # unshare(2)
_MS_BIND, _MS_REC, _MS_PRIVATE = 0x1000, 0x4000, 0x40000  # mount(2)


class Host:
    """A host of a `Network`, with an IPv4 and an IPv6 address, a name, and an own ``/etc/hosts`` with all names.

    Attributes
    ----------
    name, ipv4, ipv6, link_local : str
    namespace : Namespace
    """

    def __init__(self, network: Network, name: str, number: int, switch: Namespace) -> None:
        self.name = name
        self.ipv4 = f"10.77.0.{number}"
        self.ipv6 = f"fd77::{number:x}"
        self.link_local = f"fe80::ff:fe00:{number:x}"  # from the address below
        self._mac = f"02:00:00:00:00:{number:02x}"
        self.namespace = Namespace()
        self._network = network
        self._switch = switch
        self._port = f"port{number}"
        self._ignored: set[Host] = set()
        self._open_ports: tuple[str, ...] | None = None
        self._wire: LocalWorker | None = None
        self._members: list[Member] = []

    def connect(self, quality: wire.Quality | None = None) -> None:
        """Put a cable between this host and the switch, or a wire of some quality."""
        if quality is None:
            pair = f"link add {DEVICE} mtu {MTU} type veth peer name {self._port} mtu {MTU} netns {self._switch.path}\n"
            self._ip(pair)
        else:
            ends = wire.End(self.namespace.path, DEVICE), wire.End(self._switch.path, self._port)
            self._wire = self._network.group.start(f"wire of {self.name}", wire.serve, *ends, quality)
            assert self._wire.connection.poll(PATIENCE_S), "the wire does not begin"
            assert self._wire.connection.recv() == "ready"
        self._switch.run("ip", "-batch", "-", text=f"link set {self._port} master switch up\n")
        self._ip(
            "link set lo up\n"
            f"link set {DEVICE} address {self._mac} up\n"
            f"address add {self.ipv4}/24 dev {DEVICE}\n"
            f"address add {self.ipv6}/64 dev {DEVICE} nodad\n"
        )

    def start(self, name: str) -> Member:
        """Start a process on this host; it ends with the network."""
        member = Member(self._network.group, name, _serve, self.namespace.path, str(self._network.names))
        self._members.append(member)
        return member

    def ignore(self, *others: Host) -> None:
        """Drop what comes from other hosts, as a firewall does that tells nobody."""
        self._ignored |= set(others)
        self._set_firewall()

    def heed(self) -> None:
        """Take back every `ignore`."""
        self._ignored.clear()
        self._set_firewall()

    def open_only(self, *ports: str) -> None:
        """Let others open connections only to these ports, or ranges such as ``"26100-26199"``; without any to none."""
        self._open_ports = ports
        self._set_firewall()

    def unplug(self) -> None:
        """Pull the cable out at the switch."""
        self._switch.run("ip", "link", "set", self._port, "down")

    def plug(self) -> None:
        """Put the cable back in."""
        self._switch.run("ip", "link", "set", self._port, "up")

    def take_down(self) -> None:
        """Take the interface of the host down: it has no way to anybody."""
        self._ip(f"link set {DEVICE} down\n")

    def take_up(self) -> None:
        self._ip(f"link set {DEVICE} up\naddress replace {self.ipv6}/64 dev {DEVICE} nodad\n")

    def vanish(self) -> None:
        """Let the host lose its power: no packet tells of it, and nothing of its processes and connections is left."""
        self._switch.run("ip", "link", "delete", self._port)
        for member in self._members:
            member.kill()
        self._members.clear()
        self.namespace.close()

    def come_back(self) -> None:
        """Let a host that has vanished start again, with its addresses and nothing else."""
        self.namespace = Namespace()
        self._ignored.clear()
        self.connect()

    def limit(self, bytes_per_s: int) -> None:
        """Let the host send at most so many bytes in a second."""
        shape = ("tbf", "rate", f"{8 * bytes_per_s}bit", "burst", "64kb", "latency", "200ms")
        self.namespace.run("tc", "qdisc", "replace", "dev", DEVICE, "root", *shape)

    def unlimit(self) -> None:
        self.namespace.run("tc", "qdisc", "del", "dev", DEVICE, "root")

    def received_bytes(self) -> int:
        """Bytes that have arrived so far."""
        (device,) = json.loads(self.namespace.run("ip", "-json", "-statistics", "link", "show", DEVICE))
        return int(device["stats64"]["rx"]["bytes"])

    def wait_until_received(self, nbytes: int, since: int = 0) -> None:
        """Wait until so many bytes have arrived since the counter was at `since`."""
        wait_until(lambda: self.received_bytes() - since >= nbytes, f"{nbytes} bytes at {self.name}")

    def carried(self) -> wire.Carried:
        """Tell what the wire has done so far."""
        return self._tell_wire(None)

    def change_wire(self, quality: wire.Quality) -> None:
        """Give the wire another quality."""
        self._tell_wire(quality)

    def _tell_wire(self, quality: wire.Quality | None) -> wire.Carried:
        assert self._wire is not None, f"{self.name} hangs on a cable"
        self._wire.connection.send(quality)
        assert self._wire.connection.poll(PATIENCE_S), "the wire does not answer"
        report = self._wire.connection.recv()
        assert isinstance(report, wire.Carried)
        return report

    def _ip(self, commands: str) -> None:
        self.namespace.run("ip", "-batch", "-", text=commands)

    def _set_firewall(self) -> None:
        rules = [f"ip saddr {other.ipv4} drop\nip6 saddr {other.ipv6} drop\n" for other in self._ignored]
        if self._open_ports is not None:
            allowed = f"tcp dport != {{ {', '.join(self._open_ports)} }} " if self._open_ports else ""
            rules.append(f"iif {DEVICE} tcp flags & (syn | ack) == syn {allowed}drop\n")
        chain = f"chain arriving {{\ntype filter hook input priority 0\n{''.join(rules)}}}\n"
        replaced = "table inet hosts\ndelete table inet hosts\n"
        self.namespace.run("nft", "-f", "-", text=f"{replaced}table inet hosts {{\n{chain}}}\n")


class Network:
    """Hosts that reach each other over a switch, and the processes on them; a context manager.

    Attributes
    ----------
    group : LocalGroup
        Owns all processes.
    names : pathlib.Path
        The ``/etc/hosts`` of all hosts.
    """

    def __init__(self) -> None:
        self._opened = contextlib.ExitStack()
        self._hosts: list[Host] = []

    def __enter__(self) -> Network:
        with contextlib.ExitStack() as opening:
            folder = Path(opening.enter_context(tempfile.TemporaryDirectory()))
            self.names = folder / "hosts"
            self.names.write_text("127.0.0.1 localhost\n::1 localhost\n")
            self._switch = opening.enter_context(contextlib.closing(Namespace()))
            self._switch.run("ip", "-batch", "-", text="link add switch type bridge\nlink set switch up\n")
            opening.callback(self._close_hosts)
            self.group = opening.enter_context(process_group())
            self._opened = opening.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.close()

    def add_host(self, name: str, quality: wire.Quality | None = None) -> Host:
        """Add a host; with a quality it hangs on a wire that delays and loses frames."""
        host = Host(self, name, len(self._hosts) + 1, self._switch)
        self._hosts.append(host)
        host.connect(quality)
        with self.names.open("a") as names:  # not replaced: processes have mounted it
            names.write(f"{host.ipv4} {host.name}\n{host.ipv6} {host.name}-v6\n")
        return host

    def _close_hosts(self) -> None:
        for host in self._hosts:
            host.namespace.close()

    def part(self, one: Host, other: Host) -> None:
        """Drop all packets between two hosts."""
        one.ignore(other)
        other.ignore(one)

    def heal(self) -> None:
        """Take back what hosts ignore."""
        for host in self._hosts:
            host.heed()


def wait_until(condition: Callable[[], bool], what: str, seconds: float = PATIENCE_S) -> None:
    """Wait for something that other processes do; fail if it does not come in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {seconds} s"
        time.sleep(_PAUSE_S)


def _serve(connection: Connection, namespace: str, names: str) -> None:
    """Body of a process on a host: goes there before it does anything else."""
    enter(namespace)
    unshare(_CLONE_NEWNS)
    _mount(None, "/", _MS_REC | _MS_PRIVATE)
    _mount(names, "/etc/hosts", _MS_BIND)
    processes.serve(connection)


def _mount(source: str | None, target: str, flags: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    what = source if source is None else os.fsencode(source)
    check(libc.mount(what, os.fsencode(target), None, ctypes.c_ulong(flags), None), f"mount of {target}")
