"""Communicators over which one end copies alone: made of a rank table, with the pools of both ends bound to them.

Each end says where its device is and what of its memory may be reached, and merges the two places to the same rank
table. Making the communicator does not wait for the other end, preparing it does; so both say first that they have made
it, and none waits for an end that could not.
"""

from __future__ import annotations

import math
import secrets
import threading
import time
from typing import Callable

from llm_datadist._hccl import HcclError
from llm_datadist._hccl_gets import OneSidedExchange
from llm_datadist._hccl_regions import OneSidedCommunicator
from llm_datadist.control.messages import CommunicatorOffer, CommunicatorWish
from llm_datadist.devices.ascend.rank_table import LinkRankTable, merge_parts, read_local_part
from llm_datadist.rank_table_fields import BadRankTable
from llm_datadist.transports.hccl.hccl_device import HcclDevice
from llm_datadist.transports.hccl.making import Steps
from llm_datadist.transports.rendezvous import host_identity

# HCCL makes communicators of rank tables for one thread of a process at a time, whatever the device.
_creation = threading.Lock()

_TIMED_OUT = 9
_FIRST_TRY_S = 2  # of preparing, doubled each time: between two tries it is seen whether there is still a use


class OneSided:
    """The way of an exchange that copies out of the memory of its peer.

    Parameters
    ----------
    hccl : HcclDevice
        Of this process; must know its place.
    exchange : OneSidedExchange
        Of the link.
    """

    def __init__(self, hccl: HcclDevice, exchange: OneSidedExchange) -> None:
        self._hccl = hccl
        self._exchange = exchange

    def wish(self) -> CommunicatorWish:
        hccl, memory = self._hccl, self._hccl.registered
        return CommunicatorWish(
            host_identity(),
            hccl.device.physical_id,
            hccl.version,
            hccl.batched,
            hccl.required_place.to_json(),
            memory.address,
            memory.size,
        )

    def objection(self, wish: CommunicatorWish) -> str:
        try:
            self._rank_table(wish.place)
        except BadRankTable as error:
            return str(error)
        return self._hccl.objection_to_version(wish.version)

    def offer(self, wish: CommunicatorWish) -> CommunicatorOffer:
        settings, memory = self._hccl.settings, self._hccl.registered
        return CommunicatorOffer(
            busy=False,
            reason="",
            root_info=b"",
            name=f"llm_datadist_{secrets.token_hex(16)}",
            buffer_mib=settings.buffer_mib,
            execution_limit_s=settings.execution_limit_s,
            batched=False,
            place=self._hccl.required_place.to_json(),
            pool_address=memory.address,
            pool_bytes=memory.size,
        )

    def joining(self, offer: CommunicatorOffer, deadline: float, gives_up: Callable[[], bool]) -> Steps:
        return self._steps(offer, offer, deadline, gives_up)

    def giving(
        self, wish: CommunicatorWish, offer: CommunicatorOffer, deadline: float, gives_up: Callable[[], bool]
    ) -> Steps:
        return self._steps(offer, wish, deadline, gives_up)

    def _steps(
        self,
        offer: CommunicatorOffer,
        peer: CommunicatorWish | CommunicatorOffer,
        deadline: float,
        gives_up: Callable[[], bool],
    ) -> Steps:
        made: list[OneSidedCommunicator] = []
        return (
            lambda: made.append(self._make(offer, peer, deadline)),
            lambda: _prepare(made[0], deadline, gives_up),
        )

    def _make(
        self, offer: CommunicatorOffer, peer: CommunicatorWish | CommunicatorOffer, deadline: float
    ) -> OneSidedCommunicator:
        """Make the communicator and hand it to the exchange, which destroys it from now on."""
        table = self._rank_table(peer.place)
        if not _creation.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise TimeoutError("other communicators were being made all the time")
        try:
            communicator = OneSidedCommunicator(
                self._hccl.device,
                table.text,
                table.rank,
                offer.name,
                offer.buffer_mib,
                offer.execution_limit_s,
                self._hccl.registered,
            )
        finally:
            _creation.release()
        try:
            self._exchange.adopt_bound(communicator, peer.pool_address, peer.pool_bytes)
        except BaseException:
            communicator.destroy(int(deadline * 1e9))
            raise
        return communicator

    def _rank_table(self, place: str) -> LinkRankTable:
        return merge_parts(self._hccl.required_place, read_local_part(place, "the place of the peer's device"))


def _prepare(communicator: OneSidedCommunicator, deadline: float, gives_up: Callable[[], bool]) -> None:
    """Connect with the other end, which does the same; raises if that fails or the deadline passes."""
    seconds = _FIRST_TRY_S
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the peer's device has not connected in time")
        try:
            communicator.prepare(min(seconds, math.ceil(left)))
            return
        except HcclError as error:
            if error.code != _TIMED_OUT:
                raise
        if gives_up():
            raise ConnectionError("there is no use for the communicator any more")
        seconds *= 2
