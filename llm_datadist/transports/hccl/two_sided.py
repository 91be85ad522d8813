"""Communicators over which one end sends and the other receives: made of root information, then both meet once.

The end that is asked is rank 0 and gives the root information. Both enter HCCL at the same time, and send to and
receive from each other once: the first operation of each direction waits for the other end.
"""

from __future__ import annotations

import secrets
from typing import Callable

from llm_datadist._hccl import Communicator
from llm_datadist._hccl_exchange import Exchange
from llm_datadist.control.messages import CommunicatorOffer, CommunicatorWish
from llm_datadist.transports.hccl.hccl_device import HcclDevice
from llm_datadist.transports.hccl.making import Steps
from llm_datadist.transports.rendezvous import host_identity


class TwoSided:
    """The way of an exchange that sends and receives.

    Parameters
    ----------
    hccl : HcclDevice
        Of this process.
    exchange : Exchange
        Of the link.
    """

    def __init__(self, hccl: HcclDevice, exchange: Exchange) -> None:
        self._hccl = hccl
        self._exchange = exchange

    def wish(self) -> CommunicatorWish:
        hccl = self._hccl
        return CommunicatorWish(host_identity(), hccl.device.physical_id, hccl.version, hccl.batched, "", 0, 0)

    def objection(self, wish: CommunicatorWish) -> str:
        if wish.host == host_identity() and wish.device == self._hccl.device.physical_id:
            return f"both ends are on device {wish.device} of one server, HCCL connects two devices"
        return self._hccl.objection_to_version(wish.version)

    def offer(self, wish: CommunicatorWish) -> CommunicatorOffer:
        settings = self._hccl.settings
        return CommunicatorOffer(
            busy=False,
            reason="",
            root_info=Communicator.root_info(self._hccl.device),
            name=f"llm_datadist_{secrets.token_hex(16)}",
            buffer_mib=settings.buffer_mib,
            execution_limit_s=settings.execution_limit_s,
            batched=wish.batched and self._hccl.batched,
            place="",
            pool_address=0,
            pool_bytes=0,
        )

    def joining(self, offer: CommunicatorOffer, deadline: float, gives_up: Callable[[], bool]) -> Steps:
        return (lambda: self._make(offer, 1, deadline),)

    def giving(
        self, wish: CommunicatorWish, offer: CommunicatorOffer, deadline: float, gives_up: Callable[[], bool]
    ) -> Steps:
        return (lambda: self._make(offer, 0, deadline),)

    def _make(self, offer: CommunicatorOffer, rank: int, deadline: float) -> None:
        """Make the communicator, and meet the peer; waits as long as HCCL does."""
        communicator = Communicator(
            self._hccl.device, offer.root_info, rank, offer.name, offer.buffer_mib, offer.execution_limit_s
        )
        try:
            self._exchange.adopt(communicator, offer.batched)
        except BaseException:
            communicator.destroy(int(deadline * 1e9))
            raise
        self._exchange.warm_up(int(deadline * 1e9))
