"""All links of this process: who is linked, and word of a peer's death."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Sequence
from typing import Callable, NamedTuple

from llm_datadist.control.loop import ControlLoop
from llm_datadist.control.messages import Hello, Refuse
from llm_datadist.engine.failures import failure
from llm_datadist.engine.link import Identity, Link
from llm_datadist.engine.link_state import LinkState
from llm_datadist.status import LLMStatusCode
from llm_datadist.transports import rendezvous
from llm_datadist.transports.base import End

_log = logging.getLogger("llm_datadist.link")

MAX_LINKS = 512  # of one process, documented
_RECEIPT_SECONDS = 0.02  # between the end of a transfer at the peer and its end here


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
    communicator : int or None
        Id of the communicator that the link belongs to; None if it was made by ``link_clusters``.
    private_memory : str or None
        The way to memory that the peer's program has registered: ``process_vm`` or ``data_server``; None in KV mode.
    reason : str
        Why the link has this transport.
    """

    cluster_id: int
    state: str
    transport: str
    client: bool
    communicator: int | None = None
    private_memory: str | None = None
    reason: str = ""


class LinkTable:
    """Every link of this process, and the only place where one changes.

    A cluster has at most one link made by ``link_clusters``, from whichever side. In cache-manager mode it may have
    others besides, one for each communicator that it is a member of.

    Parameters
    ----------
    loop : ControlLoop
        Watches the connections of links; the table starts it with the first one.
    on_peer_gone : callable
        Called, without a lock, after a grant was revoked: memory and keys of that peer can be picked up.
    identity : Identity
        Of this process.
    copy_threads : int
        Threads that one transfer may use.
    """

    def __init__(
        self, loop: ControlLoop, on_peer_gone: Callable[[], None], identity: Identity, copy_threads: int = 1
    ) -> None:
        self._loop = loop
        self._copy_threads = copy_threads
        self._on_peer_gone = on_peer_gone
        self._identity = identity
        self._links: dict[int, tuple[Link, ...]] = {}  # of each cluster, the newest last
        self._opening: set[int] = set()  # clusters that a call in cache-manager mode is linking to
        self._closed = False
        self._lock = threading.Lock()  # guards all of these and every change of a link's state
        self._changed = threading.Condition(self._lock)  # a link was accepted, or the table was closed

    # ---- queries

    def __len__(self) -> int:
        return sum(len(links) for links in list(self._links.values()))

    def __contains__(self, cluster_id: int) -> bool:
        return self._find(cluster_id) is not None

    def get(self, call: str, cluster_id: int) -> Link:
        """Give the link to a cluster that ``link_clusters`` has made, also a broken one.

        Raises
        ------
        LLMException
            LLM_NOT_YET_LINK: there is none.
        """
        link = self._find(cluster_id)
        if link is None:
            reason = f"no link to cluster {cluster_id}, call link_clusters first"
            raise failure(call, LLMStatusCode.LLM_NOT_YET_LINK, reason)
        return link

    def puller(self, call: str, cluster_id: int) -> End:
        """Give the pulling end of a link; that of a broken link fails by itself. Raises as `get` does."""
        if self._identity.cache_manager:
            return self._best(call, cluster_id).end
        link = self.get(call, cluster_id)
        if not link.opened_here:
            reason = f"cluster {cluster_id} has linked to this process, not the other way round"
            raise failure(call, LLMStatusCode.LLM_NOT_YET_LINK, reason)
        return link.end

    def pusher(self, call: str, cluster_id: int) -> End:
        """Give the pushing end of a link; that of a broken link fails by itself. Raises as `get` does."""
        if self._identity.cache_manager:
            return self._best(call, cluster_id).end
        link = self.get(call, cluster_id)
        if link.opened_here:
            reason = f"this process has linked to cluster {cluster_id}, not the other way round"
            raise failure(call, LLMStatusCode.LLM_NOT_YET_LINK, reason)
        return link.end

    def describe(self) -> list[LinkDescription]:
        """List every link, also broken ones."""
        with self._lock:
            return [
                LinkDescription(
                    link.cluster_id,
                    link.state.name,
                    link.end.name,
                    link.opened_here,
                    link.communicator,
                    link.end.private_memory,
                    link.reason,
                )
                for links in self._links.values()
                for link in links
            ]

    def in_use(self) -> bool:
        """Whether there is a link, or a call is making one."""
        with self._lock:
            return bool(self._links or self._opening)

    def _find(self, cluster_id: int) -> Link | None:
        for link in self._links.get(cluster_id, ()):
            if link.communicator is None:
                return link
        return None

    def _best(self, call: str, cluster_id: int) -> Link:
        """Choose among the links to a cluster: the newest whole one, or else the newest."""
        links = self._links.get(cluster_id)
        if links is None:
            reason = f"no link to cluster {cluster_id}, call link_clusters or link first"
            raise failure(call, LLMStatusCode.LLM_NOT_YET_LINK, reason)
        for link in reversed(links):
            if link.state is LinkState.LINKED:
                return link
        return links[-1]

    def mend(self, cluster_id: int) -> None:
        """After a transfer that failed: see to it that the links to a cluster have what the next one needs."""
        with self._lock:
            for link in self._links.get(cluster_id, ()):
                link.open_channel()

    # ---- links that this process opens and closes

    def start_opening(self, cluster_id: int) -> LLMStatusCode | None:
        """Let a call link to a cluster, which ends with `end_opening`; or say why it may not."""
        with self._lock:
            link = self._find(cluster_id)
            if cluster_id in self._opening or (link is not None and link.state is LinkState.UNLINKING):
                _log.warning("cluster %d is being linked or unlinked by another call, try again", cluster_id)
                return LLMStatusCode.LLM_PROCESSING_LINK
            if link is not None and link.state is not LinkState.BROKEN:
                return LLMStatusCode.LLM_ALREADY_LINK
            if self._room() <= 0:
                _log.error("cannot link to cluster %d: %d links exist, no more are possible", cluster_id, MAX_LINKS)
                return LLMStatusCode.LLM_PARAM_INVALID
            self._opening.add(cluster_id)
        if link is not None:
            try:
                self.remove(link)
            except BaseException:
                self.end_opening(cluster_id)
                raise
        return None

    def end_opening(self, cluster_id: int) -> None:
        """Take in that a call has made its link, or has given up."""
        with self._lock:
            self._opening.discard(cluster_id)

    def wait_for(self, cluster_id: int, deadline: float) -> bool:
        """Wait until a cluster has linked to this process; False if it has not by then, or the table is closed."""
        with self._changed:
            while not self._closed:
                link = self._find(cluster_id)
                if link is not None and link.state is LinkState.LINKED:
                    return True
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            return False

    def add_opened(self, link: Link) -> None:
        """Take a link that this process has made; one that the peer has made since then goes before it.

        Raises
        ------
        LLMException
            LLM_FAILED: the table was closed meanwhile, and the link with it.
        """
        with self._lock:
            closed = self._closed
            is_new = not closed and link.cluster_id not in self
            if is_new:
                self._insert(link)
        if not is_new:
            link.end.mark_dead()
            link.close()
            if closed:
                raise failure("link_clusters", LLMStatusCode.LLM_FAILED, "the engine was finalized meanwhile")
            return
        self._loop.start()
        self._loop.call(lambda: self._watch_if_open(link))
        _log.info("linked to cluster %d over %s: %s", link.cluster_id, link.end.name, link.reason)

    def start_unlink(self, link: Link) -> bool:
        """Let no new transfer start on a link; False, and nothing changed, if one uses it.

        Waits a moment for a transfer of the peer: over tcp this side hears of its end a little later than the peer.
        """
        give_up = time.monotonic() + _RECEIPT_SECONDS
        while True:
            with self._lock:
                if link.state is LinkState.UNLINKED or link.start_unlink():
                    return True
            if link.end.busy or time.monotonic() > give_up:
                return False
            time.sleep(_RECEIPT_SECONDS / 20)

    def start_unlink_of(self, cluster_id: int) -> Link | LLMStatusCode:
        """Let no new transfer start on the link to a cluster; or say what the unlink ends with, nothing changed.

        Waits a moment as `start_unlink` does.
        """
        give_up = time.monotonic() + _RECEIPT_SECONDS
        while True:
            with self._lock:
                link = self._find(cluster_id)
                if cluster_id in self._opening or (link is not None and link.state is LinkState.UNLINKING):
                    return LLMStatusCode.LLM_PROCESSING_LINK
                if link is None:
                    return LLMStatusCode.LLM_SUCCESS
                if link.start_unlink():
                    return link
            if link.end.busy or time.monotonic() > give_up:
                return LLMStatusCode.LLM_LINK_BUSY
            time.sleep(_RECEIPT_SECONDS / 20)

    def keep(self, link: Link) -> None:
        """Take `start_unlink` back."""
        with self._lock:
            link.keep()

    def say(self, link: Link, word: bytes) -> None:
        """Say something on the connection of a link; nobody may be there to hear it."""
        with self._lock:
            self._say(link, word)

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
        self._notice_death(hello.cluster_id)
        with self._lock:
            refusal = self._make_way(hello)
        self._on_peer_gone()
        return refusal

    def add_accepted(self, hello: Hello, link: Link) -> Refuse | None:
        """Take a link that a client has made, unless what happened since it was admitted speaks against it."""
        self._notice_death(hello.cluster_id)
        with self._lock:
            refusal = self._make_way(hello)
            if refusal is None:
                self._insert(link)
        self._on_peer_gone()
        if refusal is None:
            self._watch(link)
            _log.info("linked by cluster %d over %s: %s", link.cluster_id, link.end.name, link.reason)
        return refusal

    def drop(self, cluster_id: int, token: bytes) -> LLMStatusCode:
        """Take down what a client has unlinked; a token of an earlier link is none of ours."""
        with self._lock:
            link = self._find(cluster_id)
            if link is None or link.token != token or link.opened_here:
                return LLMStatusCode.LLM_SUCCESS
            if link.state is LinkState.LINKED and not link.start_unlink(peer_is_idle=True):
                return LLMStatusCode.LLM_LINK_BUSY  # a push is running
            self._remove(link)
        self._on_peer_gone()
        _log.info("cluster %d has unlinked", cluster_id)
        return LLMStatusCode.LLM_SUCCESS

    def knows(self, cluster_id: int, token: bytes) -> bool:
        """Tell whether that very link is whole."""
        with self._lock:
            link = self._find(cluster_id)
            return link is not None and link.token == token and link.state is LinkState.LINKED

    def accepted_with(self, token: bytes) -> Link | None:
        """Give the whole link that a client has made under a token; None if there is none."""
        with self._lock:
            for links in self._links.values():
                for link in links:
                    if link.token == token and not link.opened_here and link.state is LinkState.LINKED:
                        return link
        return None

    def _notice_death(self, cluster_id: int) -> None:
        """Look whether the peer of a link has died: word of it may still lie in its connection."""
        with self._lock:
            link = self._find(cluster_id)
        if link is not None and link.state is LinkState.LINKED:
            self._on_readable(link, link.connection)

    def _make_way(self, hello: Hello) -> Refuse | None:
        """Close the link that a client's new one replaces, or say why there cannot be a new one. With the lock held."""
        number = hello.cluster_id
        if number in self._opening and hello.instance >= self._identity.instance:
            # Both sides link to each other at this moment. On both, the link of the smaller instance comes first.
            return Refuse(LLMStatusCode.LLM_PROCESSING_LINK, "this process is linking to the client")
        old = self._find(number)
        if old is None:
            if self._room() <= 0:
                return Refuse(LLMStatusCode.LLM_PARAM_INVALID, f"{MAX_LINKS} links exist, no more are possible")
            return None
        if old.state is not LinkState.BROKEN and old.instance != hello.instance:
            return Refuse(
                LLMStatusCode.LLM_LINK_FAILED,
                f"another live process is linked as cluster {number}, cluster ids must be unique",
            )
        if self._identity.cache_manager and old.state is LinkState.LINKED:
            # The client has not closed it: both sides have linked to each other, and one link is enough.
            return Refuse(LLMStatusCode.LLM_PROCESSING_LINK, "the client has a link already")
        # The same process links again, or the one that died is back: its old link is worth nothing.
        if old.state is not LinkState.BROKEN:
            old.lose_peer()
        self._remove(old)
        return None

    # ---- links of communicators: in the control thread

    def add_member(self, link: Link) -> bool:
        """Take a link of a communicator; False if there is no room for it."""
        with self._lock:
            if self._room() <= 0:
                return False
            self._insert(link)
        self._watch(link)
        _log.info("linked with member cluster %d over %s: %s", link.cluster_id, link.end.name, link.reason)
        return True

    def start_unlink_all(self, links: Sequence[Link]) -> bool:
        """Let no new transfer start on any of the links; False, and nothing changed, if one uses one of them."""
        with self._lock:
            started: list[Link] = []
            for link in links:
                if link.state not in (LinkState.LINKED, LinkState.BROKEN):
                    continue  # it is gone already
                if not link.start_unlink():
                    for other in started:
                        other.keep()
                    return False
                started.append(link)
            return True

    def leave(self, links: Sequence[Link]) -> None:
        """Close links and forget them, and let the peers know."""
        with self._lock:
            for link in links:
                self._say(link, rendezvous.GONE)
                if link.state is LinkState.LINKED:
                    link.lose_peer()
                self._remove(link)
        self._on_peer_gone()

    # ---- with the lock held

    def _room(self) -> int:
        whole = sum(1 for links in self._links.values() for link in links if link.state is not LinkState.BROKEN)
        return MAX_LINKS - whole - len(self._opening)

    def _insert(self, link: Link) -> None:
        link.end.use_threads(self._copy_threads)
        self._links[link.cluster_id] = (*self._links.get(link.cluster_id, ()), link)
        self._changed.notify_all()

    def _remove(self, link: Link) -> None:
        """Close a link and forget it, unless that was done before. In the control thread."""
        if link.state is LinkState.UNLINKED:
            return
        left = tuple(other for other in self._links.get(link.cluster_id, ()) if other is not link)
        if left:
            self._links[link.cluster_id] = left
        else:
            self._links.pop(link.cluster_id, None)
        self._loop.unwatch(link.connection)
        if link.state is not LinkState.UNLINKING:
            link.start_unlink()
        link.close()

    def _say(self, link: Link, word: bytes) -> None:
        if link.state is LinkState.UNLINKED:
            return
        try:
            link.connection.send(word)
        except OSError as error:
            _log.debug("connection of cluster %d: %s", link.cluster_id, error)

    # ---- word from the peer, or from the kernel: in the control thread

    def _watch(self, link: Link) -> None:
        connection = link.connection
        self._loop.watch(connection, lambda: self._on_readable(link, connection))
        self._loop.call(link.open_channel)  # later: what is said in the handshake comes before

    def _watch_if_open(self, link: Link) -> None:
        with self._lock:
            if link.state is LinkState.UNLINKED:
                return  # closed before the control thread came to it
        self._watch(link)

    def _on_readable(self, link: Link, connection: socket.socket) -> None:
        try:
            words, descriptors, _, _ = socket.recv_fds(connection, 64, 4, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except OSError as error:
            _log.debug("connection of cluster %d: %s", link.cluster_id, error)
            words, descriptors = b"", []
        if words:
            for descriptor in descriptors:  # data channels, which is all that comes with one
                link.grant.serve(descriptor)
            if rendezvous.CHANNEL in words and not descriptors:
                link.grant.offer_channel()
            for word in (rendezvous.UNLINK, rendezvous.BUSY, rendezvous.GONE):
                if word in words:
                    self._on_word(link, word)
            return  # whatever else it says, the peer lives
        self._loop.unwatch(connection)
        with self._lock:
            was_linked = link.state is LinkState.LINKED
            link.lose_peer()
        if was_linked:
            _log.warning("cluster %d is gone: its process ended or it closed the link", link.cluster_id)
        self._on_peer_gone()

    def _on_word(self, link: Link, word: bytes) -> None:
        with self._lock:
            if link.state is LinkState.UNLINKING:
                # Both sides unlink at this moment, or this is the answer to an unlink of this side.
                if word == rendezvous.UNLINK:
                    self._say(link, rendezvous.GONE)
                    word = rendezvous.GONE
                link.hear_farewell(word)
                return
            if link.state is not LinkState.LINKED or word == rendezvous.BUSY:
                return
            if word == rendezvous.UNLINK:
                if not link.start_unlink(peer_is_idle=True):
                    self._say(link, rendezvous.BUSY)
                    return
                self._say(link, rendezvous.GONE)
            else:
                link.lose_peer()
            self._remove(link)
        _log.info("cluster %d has unlinked", link.cluster_id)
        self._on_peer_gone()

    def close(self) -> None:
        """Close every link on this side. The control loop has ended."""
        with self._lock:
            self._closed = True
            self._changed.notify_all()
            for links in list(self._links.values()):
                for link in links:
                    link.end.mark_dead()  # ends running transfers
                    link.hear_farewell(b"")
                    if link.state is LinkState.LINKED:
                        link.lose_peer()
                    self._remove(link)
