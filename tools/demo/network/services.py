"""The services that a driver knows: found through the registry, connected, and watched."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, NamedTuple

import zmq

from llm_datadist import LLMRole
from llm_datadist.cluster import ClusterMember, MemberInfo
from llm_datadist.tools.demo.network.labels import endpoint_of, follow_labels
from llm_datadist.tools.demo.network.service_connection import ServiceConnection

_LOOK_S = 0.2  # between two looks at who is there


class Event(NamedTuple):
    """A message of a service, or None if the service is gone."""

    service: ServiceConnection
    message: Any | None


class Services:
    """All services of a mode; a context manager.

    Parameters
    ----------
    registry : str
        ``tcp://host:port``.
    mode : str
        ``"cache"`` or ``"blocks"``.
    """

    def __init__(self, registry: str, mode: str) -> None:
        self._labels = follow_labels(mode)
        self._context = zmq.Context()
        self._poller = zmq.Poller()
        self._connections: dict[int, ServiceConnection] = {}  # by cluster id
        self._looked_s = float("-inf")
        self._lookout = ClusterMember(None, registry)

    def __enter__(self) -> Services:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for cluster_id in list(self._connections):
            self._drop(cluster_id)
        self._context.term()
        self._lookout.close()

    def ready(self, role: LLMRole | None = None) -> list[ServiceConnection]:
        """List the services of a role that can be asked now, by cluster id."""
        return [
            service
            for _, service in sorted(self._connections.items())
            if service.ready and service.member.available and role in (None, service.role)
        ]

    def poll(self, timeout_s: float) -> list[Event]:
        """Wait up to `timeout_s` for something to happen; gives messages, and services that are gone, in order."""
        events = self._look() if time.monotonic() - self._looked_s >= _LOOK_S else []
        self._poller.poll(0 if events else int(timeout_s * 1000))
        for cluster_id, service in list(self._connections.items()):
            service.read_events()
            events += [Event(service, message) for message in service.receive()]
            if service.lost:
                events.append(Event(service, None))
                self._drop(cluster_id)
        return events

    def _look(self) -> list[Event]:
        """Connect to services that have come, and give up those in whose place another process is."""
        self._looked_s = time.monotonic()
        events = []
        for member in self._lookout.members(labels=self._labels):
            known = self._connections.get(member.cluster_id)
            if known is not None and known.member.instance != member.instance:
                if known.ready:
                    events.append(Event(known, None))
                self._drop(member.cluster_id)
                known = None
            if known is None:
                self._connect(member)
            else:
                known.member = member
        return events

    def _connect(self, member: MemberInfo) -> None:
        endpoint = endpoint_of(member)
        if endpoint is None:
            return
        service = ServiceConnection(self._context, member, endpoint)
        self._connections[member.cluster_id] = service
        self._poller.register(service.socket, zmq.POLLIN)
        self._poller.register(service.monitor, zmq.POLLIN)

    def _drop(self, cluster_id: int) -> None:
        service = self._connections.pop(cluster_id)
        self._poller.unregister(service.socket)
        self._poller.unregister(service.monitor)
        service.close()
