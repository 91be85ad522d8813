"""All links of this process: who is linked, what a link or unlink call answers, and word of a peer's death."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Callable, NamedTuple

import zmq

from llm_datadist.control.client import NoAnswer, Unreachable
from llm_datadist.control.loop import ControlLoop
from llm_datadist.control.messages import Hello, MessageError, Refuse
from llm_datadist.engine.failures import failure
from llm_datadist.engine.link import ClusterAddress, Link
from llm_datadist.engine.link_client import Identity, LinkClient, LinkRefused
from llm_datadist.engine.link_server import LinkServer
from llm_datadist.engine.link_state import LinkState
from llm_datadist.roles import LLMRole
from llm_datadist.status import LLMException, LLMStatusCode
from llm_datadist.transports.base import Puller
from llm_datadist.transports.shared_memory import SharedMemoryGrant

_log = logging.getLogger("llm_datadist.link")

MAX_CLUSTERS_A_CALL = 16  # documented
MAX_LINKS = 512  # of one process, documented

LinkResult = tuple[LLMStatusCode, list[LLMStatusCode]]


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
    """The links of one process.

    Parameters
    ----------
    loop : ControlLoop
        Watches connections and carries the server's messages; the table starts it when it needs it.
    identity : Identity
        Of this process.
    make_grant : callable
        Makes the server's end of the transport for one link.
    on_peer_gone : callable
        Called, without a lock, after a grant was revoked: memory and keys of that peer can be picked up.
    """

    def __init__(
        self,
        loop: ControlLoop,
        identity: Identity,
        make_grant: Callable[[], SharedMemoryGrant],
        on_peer_gone: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._identity = identity
        self._make_grant = make_grant
        self._on_peer_gone = on_peer_gone
        self._client = LinkClient(loop.context, identity)
        self._server: LinkServer | None = None
        self._links: dict[int, Link] = {}
        self._lock = threading.Lock()  # guards _links and every change of a link's state
        self._one_call = threading.Lock()  # held by the running link or unlink call

    # ---- queries

    def puller(self, call: str, cluster_id: int) -> Puller:
        """Give the pulling end of a link; that of a broken link fails by itself.

        Raises
        ------
        LLMException
            LLM_NOT_YET_LINK: this process has not linked to the cluster.
        """
        link = self._links.get(cluster_id)
        if link is None or link.puller is None:
            raise _not_linked(call, cluster_id)
        return link.puller

    def describe(self) -> list[LinkDescription]:
        """List every link, also broken ones."""
        with self._lock:
            return [
                LinkDescription(link.cluster_id, link.state.name, link.transport, link.puller is not None)
                for link in self._links.values()
            ]

    # ---- the server's side

    def listen(self, host: str, port: int) -> None:
        """Accept links at an address.

        Raises
        ------
        LLMException
            LLM_FAILED: the address cannot be bound.
        """
        server = LinkServer(
            self._loop, self._identity, self._make_grant, self._admit, self._add, self._drop_told, self._knows
        )
        try:
            server.start(host, port)
        except zmq.ZMQError as error:
            server.close()
            raise failure(
                "init",
                LLMStatusCode.LLM_FAILED,
                f"cannot listen on {host}:{port} ({error.strerror}), choose a free port",
            ) from error
        self._server = server

    def _admit(self, hello: Hello) -> Refuse | None:
        with self._lock:
            old = self._links.get(hello.cluster_id)
            if old is None:
                alive = sum(1 for link in self._links.values() if link.state is not LinkState.BROKEN)
                if alive >= MAX_LINKS:
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

    def _add(self, link: Link) -> None:
        with self._lock:
            self._links[link.cluster_id] = link
        self._watch(link)
        _log.info("linked by cluster %d over %s", link.cluster_id, link.transport)

    def _drop_told(self, cluster_id: int, token: bytes) -> LLMStatusCode:
        """Take down what a client has unlinked; a token of an earlier link is none of ours."""
        with self._lock:
            link = self._links.get(cluster_id)
            if link is None or link.token != token or link.grant is None:
                return LLMStatusCode.LLM_SUCCESS
            # The client has no transfer running, or it would not ask.
            if link.state is LinkState.LINKED:
                link.lose_peer()
            self._remove(link)
        self._on_peer_gone()
        _log.info("cluster %d has unlinked", cluster_id)
        return LLMStatusCode.LLM_SUCCESS

    def _knows(self, cluster_id: int, token: bytes) -> bool:
        with self._lock:
            link = self._links.get(cluster_id)
            return link is not None and link.token == token and link.state is LinkState.LINKED

    def _remove(self, link: Link) -> None:
        """Close a link and forget it. With the lock held, in the control thread or after `_unwatch`."""
        if self._links.get(link.cluster_id) is link:
            del self._links[link.cluster_id]
        if link.connection is not None:
            self._loop.unwatch(link.connection)
        if link.state is not LinkState.UNLINKING:
            link.start_unlink()
        link.close()

    # ---- word from the kernel

    def _watch(self, link: Link) -> None:
        connection = link.connection
        assert connection is not None
        self._loop.watch(connection, lambda: self._on_readable(link, connection))

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

    def _in_loop(self, function: Callable[[], None]) -> None:
        """Run a function in the control thread and wait until it has run."""
        done = threading.Event()

        def run() -> None:
            try:
                function()
            finally:
                done.set()

        self._loop.start()
        self._loop.call(run)
        if not done.wait(5.0):
            raise LLMException("the control thread does not answer", status_code=LLMStatusCode.LLM_FAILED)

    # ---- the client's calls

    def link(self, clusters: Sequence[ClusterAddress], timeout_ms: int, role: LLMRole, num_devices: int) -> LinkResult:
        """Link to each of the clusters at the same time; see ``LLMDataDist.link_clusters`` for the answers."""
        deadline = time.monotonic() + timeout_ms / 1000
        if role is not LLMRole.DECODER:
            return _refused(LLMStatusCode.LLM_PARAM_INVALID, "link_clusters", f"role is {role}, only DECODER links")
        reason = _bad_addresses(clusters, num_devices, same_local=True)
        if reason:
            return _refused(LLMStatusCode.LLM_PARAM_INVALID, "link_clusters", reason)
        if len(clusters) > MAX_CLUSTERS_A_CALL:
            reason = f"{len(clusters)} clusters in one call, at most {MAX_CLUSTERS_A_CALL}"
            return _refused(LLMStatusCode.LLM_CLUSTER_NUM_EXCEED_LIMIT, "link_clusters", reason)
        if not self._one_call.acquire(blocking=False):
            return _refused(
                LLMStatusCode.LLM_PROCESSING_LINK, "link_clusters", "another link or unlink call is running"
            )
        try:
            return self._link(clusters, deadline)
        finally:
            self._one_call.release()

    def _link(self, clusters: Sequence[ClusterAddress], deadline: float) -> LinkResult:
        results, todo = self._sort_out(clusters)
        if len(self._links) + len(todo) > MAX_LINKS:
            _log.error("link_clusters: %d links exist, at most %d are possible", len(self._links), MAX_LINKS)
            code = LLMStatusCode.LLM_PARAM_INVALID
            return code, [code] * len(clusters)
        if todo:
            self._loop.start()
            with ThreadPoolExecutor(len(todo), "llm_datadist-link") as pool:
                futures = {index: pool.submit(self._link_one, clusters[index], deadline) for index in todo}
            for index, future in futures.items():
                results[index] = future.result()
        good = (LLMStatusCode.LLM_SUCCESS, LLMStatusCode.LLM_ALREADY_LINK)
        worst = LLMStatusCode.LLM_SUCCESS if all(code in good for code in results) else LLMStatusCode.LLM_LINK_FAILED
        return worst, results

    def _sort_out(self, clusters: Sequence[ClusterAddress]) -> tuple[list[LLMStatusCode], list[int]]:
        """Answer what needs no peer; returns the results so far and the indices of the clusters to link."""
        results = [LLMStatusCode.LLM_LINK_FAILED] * len(clusters)
        todo: dict[int, int] = {}
        for index, cluster in enumerate(clusters):
            if cluster.remote_cluster_id in self._links:
                results[index] = LLMStatusCode.LLM_ALREADY_LINK
            elif cluster.remote_cluster_id in todo:
                results[index] = LLMStatusCode.LLM_REPEAT_REQUEST
            else:
                todo[cluster.remote_cluster_id] = index
        return results, list(todo.values())

    def _link_one(self, cluster: ClusterAddress, deadline: float) -> LLMStatusCode:
        try:
            link = self._client.set_up(cluster, deadline)
        except LinkRefused as error:
            _log.warning("cannot link to cluster %d: %s", cluster.remote_cluster_id, error)
            return error.code
        with self._lock:
            self._links[cluster.remote_cluster_id] = link
        self._loop.call(lambda: self._watch_if_open(link))
        _log.info("linked to cluster %d over %s", link.cluster_id, link.transport)
        return LLMStatusCode.LLM_SUCCESS

    def _watch_if_open(self, link: Link) -> None:
        with self._lock:
            if link.state is not LinkState.LINKED:
                return  # unlinked before the control thread came to it
        self._watch(link)

    def unlink(
        self, clusters: Sequence[ClusterAddress], timeout_ms: int, force: bool, role: LLMRole, num_devices: int
    ) -> LinkResult:
        """Take links down; see ``LLMDataDist.unlink_clusters`` for the answers."""
        deadline = time.monotonic() + timeout_ms / 1000
        reason = _bad_addresses(clusters, num_devices, same_local=False)
        if reason:
            return _refused(LLMStatusCode.LLM_PARAM_INVALID, "unlink_clusters", reason)
        if len(clusters) > MAX_CLUSTERS_A_CALL:
            reason = f"{len(clusters)} clusters in one call, at most {MAX_CLUSTERS_A_CALL}"
            return _refused(LLMStatusCode.LLM_CLUSTER_NUM_EXCEED_LIMIT, "unlink_clusters", reason)
        if not self._one_call.acquire(blocking=False):
            return _refused(
                LLMStatusCode.LLM_PROCESSING_LINK, "unlink_clusters", "another link or unlink call is running"
            )
        try:
            return self._unlink(clusters, deadline, force, role)
        finally:
            self._one_call.release()

    def _unlink(self, clusters: Sequence[ClusterAddress], deadline: float, force: bool, role: LLMRole) -> LinkResult:
        results: list[LLMStatusCode | None] = [None] * len(clusters)
        todo: dict[int, int] = {}
        for index, cluster in enumerate(clusters):
            if cluster.remote_cluster_id not in self._links:
                results[index] = LLMStatusCode.LLM_NOT_YET_LINK
            elif cluster.remote_cluster_id in todo:
                results[index] = LLMStatusCode.LLM_REPEAT_REQUEST
            else:
                todo[cluster.remote_cluster_id] = index
        if todo:
            with ThreadPoolExecutor(len(todo), "llm_datadist-unlink") as pool:
                futures = {
                    index: pool.submit(self._unlink_one, clusters[index], deadline, force, role)
                    for index in todo.values()
                }
            for index, future in futures.items():
                results[index] = future.result()
        answers = [code for code in results if code is not None]
        good = (LLMStatusCode.LLM_SUCCESS, LLMStatusCode.LLM_NOT_YET_LINK)
        worst = LLMStatusCode.LLM_SUCCESS if all(code in good for code in answers) else LLMStatusCode.LLM_UNLINK_FAILED
        return worst, answers

    def _unlink_one(self, cluster: ClusterAddress, deadline: float, force: bool, role: LLMRole) -> LLMStatusCode:
        with self._lock:
            link = self._links.get(cluster.remote_cluster_id)
            if link is None:
                return LLMStatusCode.LLM_NOT_YET_LINK  # the peer took it down in this very moment
            if link.address is not None and role is LLMRole.DECODER and not _same_ips(link.address, cluster):
                _log.error("unlink of cluster %d: it was linked at other addresses", link.cluster_id)
                return LLMStatusCode.LLM_PARAM_INVALID
            if not link.start_unlink():
                _log.warning("unlink of cluster %d: a transfer uses the link, try again", link.cluster_id)
                return LLMStatusCode.LLM_LINK_BUSY
        result = LLMStatusCode.LLM_SUCCESS
        if link.address is not None and not force:
            result = self._client.unlink(link, deadline)
            if result is LLMStatusCode.LLM_LINK_BUSY:
                with self._lock:
                    link.keep()
                return result
        self._in_loop(lambda: self._finish_unlink(link))
        return result

    def _finish_unlink(self, link: Link) -> None:
        with self._lock:
            self._remove(link)
        self._on_peer_gone()

    def check(self, cluster_id: int, timeout_ms: int) -> None:
        """Ask the peer whether a link is whole; see ``LLMDataDist.check_link_status``."""
        call = "check_link_status"
        link = self._links.get(cluster_id)
        if link is None:
            raise _not_linked(call, cluster_id)
        if link.busy:
            raise failure(call, LLMStatusCode.LLM_LINK_BUSY, f"a pull from cluster {cluster_id} is running, try again")
        reason = f"cluster {cluster_id} is dead or has closed the link: unlink, then link again"
        if link.state is LinkState.LINKED:
            try:
                if self._client.probe(link, time.monotonic() + timeout_ms / 1000):
                    return
            except (NoAnswer, Unreachable, MessageError) as error:
                reason = f"{error} (sync_kv_timeout {timeout_ms} ms)"
        raise failure(call, LLMStatusCode.LLM_WAIT_PROCESS_TIMEOUT, reason)

    def close(self) -> None:
        """Close every link on this side. The control loop has ended."""
        if self._server is not None:
            self._server.close()
            self._server = None
        with self._lock:
            for link in list(self._links.values()):
                if link.puller is not None:
                    link.puller.mark_dead()  # ends running pulls
                if link.state is LinkState.LINKED:
                    link.lose_peer()
                self._remove(link)


def _not_linked(call: str, cluster_id: int) -> LLMException:
    reason = f"no link to cluster {cluster_id}, call link_clusters first"
    return failure(call, LLMStatusCode.LLM_NOT_YET_LINK, reason)


def _refused(code: LLMStatusCode, call: str, reason: str) -> LinkResult:
    _log.error("%s: %s", call, reason)
    return code, []


def _bad_addresses(clusters: Sequence[ClusterAddress], num_devices: int, same_local: bool) -> str:
    """Say what is wrong with the addresses of a call, or nothing."""
    if not clusters:
        return "no clusters given"
    for cluster in clusters:
        name = f"cluster {cluster.remote_cluster_id}"
        if not cluster.local or not cluster.remote:
            return f"{name} lacks local or remote addresses, append one of each for every device"
        if not len(cluster.local) == len(cluster.remote) == num_devices:
            numbers = f"{len(cluster.local)} local and {len(cluster.remote)} remote addresses"
            return f"{name} has {numbers} for {num_devices} devices"
        if same_local and _ips(cluster.local) != _ips(clusters[0].local):
            return f"{name} has other local addresses than cluster {clusters[0].remote_cluster_id}"
    return ""


def _ips(addresses: tuple[tuple[int, int], ...]) -> list[int]:
    return [ip for ip, _ in addresses]


def _same_ips(linked: ClusterAddress, given: ClusterAddress) -> bool:
    return _ips(linked.local) == _ips(given.local) and _ips(linked.remote) == _ips(given.remote)
