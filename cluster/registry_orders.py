"""Orders that members have been given and have not reported on. No sockets; the clock is given."""

from __future__ import annotations

from dataclasses import dataclass

from llm_datadist.cluster.registry_messages import Order

MAX_ORDERS = 1024
_MOST_MS = 3_600_000


@dataclass(frozen=True)
class PendingOrder:
    """An order, and where the report on it goes."""

    cluster_id: int
    deadline: float
    peer: bytes
    request: bytes


class RegistryOrders:
    """Orders by their random name."""

    def __init__(self) -> None:
        self._pending: dict[bytes, PendingOrder] = {}

    def add(self, order: Order, peer: bytes, request: bytes, now: float) -> bool:
        """Note an order, or where one that is there came from last; False if there is no room."""
        if order.order not in self._pending and len(self._pending) >= MAX_ORDERS:
            return False
        deadline = now + min(order.timeout_ms, _MOST_MS) / 1000
        self._pending[order.order] = PendingOrder(order.cluster_id, deadline, peer, request)
        return True

    def take(self, order: bytes) -> PendingOrder | None:
        """Forget an order and give it; None if there is none of that name."""
        return self._pending.pop(order, None)

    def of_member(self, cluster_id: int) -> list[PendingOrder]:
        """Forget the orders for a member and give them."""
        names = [name for name, order in self._pending.items() if order.cluster_id == cluster_id]
        return [self._pending.pop(name) for name in names]

    def expire(self, now: float) -> None:
        """Forget orders whose time is over; who gave them has stopped waiting."""
        for name in [name for name, order in self._pending.items() if order.deadline <= now]:
            del self._pending[name]

    def next_due(self) -> float | None:
        """Tell when to call `expire` next."""
        return min((order.deadline for order in self._pending.values()), default=None)
