"""All links of this process: who is linked, and word of a peer's death."""

from __future__ import annotations

import logging
import socket
import threading
from typing import Callable, NamedTuple

from llm_datadist.control.loop import ControlLoop
from llm_datadist.control.messages import Hello, Refuse
from llm_datadist.engine.failures import failure
from llm_datadist.engine.link import Link
from llm_datadist.engine.link_state import LinkState
from llm_datadist.status import LLMStatusCode
from llm_datadist.transports.base import End

_log = logging.getLogger("llm_datadist.link")

MAX_LINKS = 512  # of one process, documented


class LinkDescription(NamedTuple):
    """What a link is made of, for logs and people.

    Attributes
    ----------
    cluster_id : int
        Of the remote cluster.
    state : str
        Name of its `LinkState`.
    transport : str
        How bytes move.
    client : bool
        Whether this process opened the link.
    """

    cluster_id: int
    state: str
    transport: str
    client: bool


class LinkTable:
    """Every link of this process, and the only place where one changes.

    Parameters
    ----------
    loop : ControlLoop
        Watches the connections of links; the table starts it with the first one.
    on_peer_gone : callable
        Called, without a lock, after a grant was revoked: memory and keys of that peer can be picked up.
    """

    def __init__(self, loop: ControlLoop, on_peer_gone: Callable[[], None]) -> None:
        self._loop = loop
        self._on_peer_gone = on_peer_gone
        self._links: dict[int, Link] = {}
        self._lock = threading.Lock()  # guards _links and every change of a link's state

    # ---- queries

    def __len__(self) -> int:
        return len(self._links)

    def __contains__(self, cluster_id: int) -> bool:
        return cluster_id in self._links

    def get(self, call: str, cluster_id: int) -> Link:
        """Give the link to a cluster, also a broken one.

        Raises
        ------
        LLMException
            LLM_NOT_YET_LINK: there is none.
        """
        link = self._links.get(cluster_id)
        if link is None:
            reason = f"no link to cluster {cluster_id}, call link_clusters first"
            raise failure(call, LLMStatusCode.LLM_NOT_YET_LINK, reason)
        return link

    def puller(self, call: str, cluster_id: int) -> End:
        """Give the pulling end of a link; that of a broken link fails by itself. Raises as `get` does."""
        link = self.get(call, cluster_id)
        if not link.opened_here:
            reason = f"cluster {cluster_id} has linked to this process, not the other way round"
            raise failure(call, LLMStatusCode.LLM_NOT_YET_LINK, reason)
        return link.end

    def pusher(self, call: str, cluster_id: int) -> End:
        """Give the pushing end of a link; that of a broken link fails by itself. Raises as `get` does."""
        link = self.get(call, cluster_id)
        if link.opened_here:
            reason = f"this process has linked to cluster {cluster_id}, not the other way round"
            raise failure(call, LLMStatusCode.LLM_NOT_YET_LINK, reason)
        return link.end

    def describe(self) -> list[LinkDescription]:
        """List every link, also broken ones."""
        with self._lock:
            return [
                LinkDescription(link.cluster_id, link.state.name, link.end.name, link.opened_here)
                for link in self._links.values()
            ]

    # ---- links that this process opens and closes

    def add_opened(self, link: Link) -> None:
        """Take a link that this process has made."""
        with self._lock:
            self._links[link.cluster_id] = link
        self._loop.start()
        self._loop.call(lambda: self._watch_if_open(link))
        _log.info("linked to cluster %d over %s", link.cluster_id, link.end.name)

    def start_unlink(self, link: Link) -> bool:
        """Let no new transfer start on a link; False, and nothing changed, if one uses it."""
        with self._lock:
            return link.state is LinkState.UNLINKED or link.start_unlink()

    def keep(self, link: Link) -> None:
        """Take `start_unlink` back."""
        with self._lock:
            link.keep()

    def remove(self, link: Link) -> None:
        """Close a link and forget it; returns when the control thread has done so.

        Raises
        ------
        LLMException
            LLM_FAILED: the control thread does not answer.
        """

        def close() -> None:
            with self._lock:
                self._remove(link)
            self._on_peer_gone()

        try:
            self._loop.ask(close)
        except TimeoutError as error:
            raise failure("unlink_clusters", LLMStatusCode.LLM_FAILED, str(error)) from error

    # ---- links that clients open and close: in the control thread

    def room(self) -> int:
        """Tell how many more clients may link."""
        with self._lock:
            return self._room()

    def admit(self, hello: Hello) -> Refuse | None:
        """Say why a client must be refused, or None; a link that the new one replaces is closed."""
        with self._lock:
            old = self._links.get(hello.cluster_id)
            if old is None:
                if self._room() <= 0:
                    return Refuse(LLMStatusCode.LLM_PARAM_INVALID, f"{MAX_LINKS} links exist, no more are possible")
                return None
            if old.state is not LinkState.BROKEN and old.instance != hello.instance:
                return Refuse(
                    LLMStatusCode.LLM_LINK_FAILED,
                    f"another live process is linked as cluster {hello.cluster_id}, cluster ids must be unique",
                )
            # The same process links again, or the one that died is back: its old link is worth nothing.
            if old.state is not LinkState.BROKEN:
                old.lose_peer()
            self._remove(old)
        self._on_peer_gone()
        return None

    def add_accepted(self, link: Link) -> None:
        """Take a link that a client has made."""
        with self._lock:
            self._links[link.cluster_id] = link
        self._watch(link)
        _log.info("linked by cluster %d over %s", link.cluster_id, link.end.name)

    def drop(self, cluster_id: int, token: bytes) -> LLMStatusCode:
        """Take down what a client has unlinked; a token of an earlier link is none of ours."""
        with self._lock:
            link = self._links.get(cluster_id)
            if link is None or link.token != token or link.opened_here:
                return LLMStatusCode.LLM_SUCCESS
            if link.state is LinkState.LINKED and not link.start_unlink():
                return LLMStatusCode.LLM_LINK_BUSY  # a push is running
            self._remove(link)
        self._on_peer_gone()
        _log.info("cluster %d has unlinked", cluster_id)
        return LLMStatusCode.LLM_SUCCESS

    def knows(self, cluster_id: int, token: bytes) -> bool:
        """Tell whether that very link is whole."""
        with self._lock:
            link = self._links.get(cluster_id)
            return link is not None and link.token == token and link.state is LinkState.LINKED

    def _room(self) -> int:
        return MAX_LINKS - sum(1 for link in self._links.values() if link.state is not LinkState.BROKEN)

    def _remove(self, link: Link) -> None:
        """Close a link and forget it, unless that was done before. With the lock held, in the control thread."""
        if link.state is LinkState.UNLINKED:
            return
        if self._links.get(link.cluster_id) is link:
            del self._links[link.cluster_id]
        self._loop.unwatch(link.connection)
        if link.state is not LinkState.UNLINKING:
            link.start_unlink()
        link.close()

    # ---- word from the kernel

    def _watch(self, link: Link) -> None:
        connection = link.connection
        self._loop.watch(connection, lambda: self._on_readable(link, connection))

    def _watch_if_open(self, link: Link) -> None:
        with self._lock:
            if link.state is not LinkState.LINKED:
                return  # unlinked before the control thread came to it
        self._watch(link)

    def _on_readable(self, link: Link, connection: socket.socket) -> None:
        try:
            if connection.recv(64):
                return  # nothing is said on this connection after the handshake; whatever it is, the peer lives
        except BlockingIOError:
            return
        except OSError as error:
            _log.debug("connection of cluster %d: %s", link.cluster_id, error)
        self._loop.unwatch(connection)
        with self._lock:
            was_linked = link.state is LinkState.LINKED
            link.lose_peer()
        if was_linked:
            _log.warning("cluster %d is gone: its process ended or it closed the link", link.cluster_id)
        self._on_peer_gone()

    def close(self) -> None:
        """Close every link on this side. The control loop has ended."""
        with self._lock:
            for link in list(self._links.values()):
                link.end.mark_dead()  # ends running transfers
                if link.state is LinkState.LINKED:
                    link.lose_peer()
                self._remove(link)
