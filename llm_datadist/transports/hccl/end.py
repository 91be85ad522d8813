"""The two ends of a link over HCCL, as the engine sees them."""

from __future__ import annotations

import socket
import threading
from typing import Callable

from llm_datadist._directory import Directory
from llm_datadist._hccl_end import HcclPeer, HcclServer
from llm_datadist._hccl_exchange import Exchange
from llm_datadist._hccl_one_sided import OneSidedPeer, OneSidedServer
from llm_datadist._segment import Memory, Segment
from llm_datadist.transports.hccl import NAME, ONE_SIDED
from llm_datadist.transports.hccl.hccl_device import HcclDevice
from llm_datadist.transports.hccl.making import Maker, Way
from llm_datadist.transports.hccl.one_sided import OneSided
from llm_datadist.transports.hccl.two_sided import TwoSided
from llm_datadist.transports.serving_threads import ServingThreads
from llm_datadist.transports.tcp import TcpGrant


class SharedExchange:
    """The exchange of one link, taken down when the last one that uses it has let go.

    Parameters
    ----------
    hccl : HcclDevice
        Of this process.
    one_sided : bool
        Whether one end copies alone.

    Attributes
    ----------
    exchange : Exchange
    way : Way
        How its communicators are made.
    """

    def __init__(self, hccl: HcclDevice, *, one_sided: bool) -> None:
        self.exchange: Exchange
        self.way: Way
        if one_sided:
            gets = hccl.new_one_sided_exchange()
            self.exchange, self.way = gets, OneSided(hccl, gets)
        else:
            self.exchange = hccl.new_exchange()
            self.way = TwoSided(hccl, self.exchange)
        self._hccl = hccl
        self._holders = 0
        self._lock = threading.Lock()

    def hold(self) -> None:
        with self._lock:
            self._holders += 1

    def let_go(self) -> None:
        with self._lock:
            self._holders -= 1
            last = self._holders == 0
        if last:
            self._hccl.retire(self.exchange)


class HcclEnd(HcclPeer):
    """The initiator's end of a link.

    Parameters
    ----------
    hccl : HcclDevice
        Of this process.
    shared : SharedExchange
        Of the link.
    want_channel : callable
        See to it that there will be another data connection; must not block.
    on_close : callable or None
        Called when the end is closed.
    private_memory : str or None
        What the description of the link says about registered memory.
    """

    name = NAME

    def __init__(
        self,
        hccl: HcclDevice,
        shared: SharedExchange,
        want_channel: Callable[[], None],
        on_close: Callable[[], None] | None,
        private_memory: str | None,
    ) -> None:
        super().__init__(shared.exchange)
        self.private_memory = private_memory
        self.maker = Maker(hccl, shared.exchange, shared.way, self, shared.hold, shared.let_go)
        self._want = want_channel
        self._on_close = on_close
        self._shared: SharedExchange | None = shared
        shared.hold()

    def _want_channel(self) -> None:
        self._want()

    def _want_communicator(self, deadline_ns: int) -> bool:
        return self.maker.want(deadline_ns)

    def begin_preparing(self, on_end: Callable[[], None]) -> None:
        """Begin to make the communicator."""
        self.maker.begin(on_end)

    def prepare(self, deadline_ns: int) -> None:
        """Have a communicator by the deadline."""
        try:
            made = self.maker.want(deadline_ns)
        except OSError:
            raise
        except Exception as error:
            raise ConnectionError(f"no communicator: {error}") from error
        if not made:
            raise socket.timeout("the communicator was not made in time")

    def open_channel(self, connection: socket.socket) -> None:
        """See to it that there is a data connection; `connection`, that of the link, is not needed for it."""
        if not self.channels:
            self._want()

    def close(self, deadline_ns: int) -> bool:
        if self._on_close is not None:
            self._on_close()
        done = super().close(deadline_ns)
        if done and self._shared is not None:
            shared, self._shared = self._shared, None
            shared.let_go()
        return done


class OneSidedEnd(HcclEnd, OneSidedPeer):
    """The same of a link over which one end copies alone."""

    name = ONE_SIDED


class HcclGrant(TcpGrant):
    """What one peer may reach; the parameters are those of `TcpGrant`, the exchange of the link, and its end here."""

    name = NAME

    def __init__(
        self,
        pool: Memory,
        directory: Directory,
        lock: threading.Lock,
        threads: ServingThreads,
        *,
        peer_writes: bool,
        shared: SharedExchange,
        maker: Maker,
    ) -> None:
        self._shared = shared
        self._maker = maker
        shared.hold()
        super().__init__(pool, directory, lock, threads, peer_writes=peer_writes)

    def _new_server(self, pool: Memory, ledger: Segment, claims: Segment, *, peer_writes: bool) -> HcclServer:
        return _Server(pool, self._directory.segment, ledger, claims, peer_writes, self._shared.exchange, self._maker)

    def _begin_serving(self) -> None:
        super()._begin_serving()
        self._shared.hold()

    def _end_serving(self) -> None:
        super()._end_serving()
        self._shared.let_go()

    def revoke(self) -> None:
        with self._lock:
            first = not self._revoked
        super().revoke()
        if first:
            self._shared.let_go()


class OneSidedGrant(HcclGrant):
    """The same of a link over which one end copies alone."""

    name = ONE_SIDED

    def _new_server(self, pool: Memory, ledger: Segment, claims: Segment, *, peer_writes: bool) -> HcclServer:
        segment, exchange = self._directory.segment, self._shared.exchange
        return _OneSidedServer(pool, segment, ledger, claims, peer_writes, exchange, self._maker)


def data_link(
    hccl: HcclDevice,
    want_channel: Callable[[], None],
    on_close: Callable[[], None] | None,
    private_memory: str | None,
    granted: tuple[Memory, Directory, threading.Lock, ServingThreads],
    *,
    peer_writes: bool,
    one_sided: bool,
) -> tuple[HcclEnd, HcclGrant]:
    """Begin a link: both of its ends on this side, which share the exchange."""
    shared = SharedExchange(hccl, one_sided=one_sided)
    end_class, grant_class = (OneSidedEnd, OneSidedGrant) if one_sided else (HcclEnd, HcclGrant)
    end = end_class(hccl, shared, want_channel, on_close, private_memory)
    return end, grant_class(*granted, peer_writes=peer_writes, shared=shared, maker=end.maker)


class _Server(HcclServer):
    """A server that leaves the making of communicators to the maker of its link."""

    def __init__(
        self,
        pool: Memory,
        directory: Segment,
        ledger: Segment,
        claims: Segment,
        peer_writes: bool,
        exchange: Exchange,
        maker: Maker,
    ) -> None:
        super().__init__(pool, directory, ledger, claims, peer_writes, exchange)
        self._maker = maker

    def _make_communicator(self, fd: int, timeout_ns: int) -> bool:
        return self._maker.answer(fd, timeout_ns)


class _OneSidedServer(_Server, OneSidedServer):
    """The same of a link over which one end copies alone."""
