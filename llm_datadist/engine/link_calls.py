"""What a link, unlink or check call of this process answers."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Callable

from llm_datadist.control.client import NoAnswer, Unreachable
from llm_datadist.control.messages import MessageError
from llm_datadist.engine.failures import failure
from llm_datadist.engine.link import ClusterAddress
from llm_datadist.engine.link_client import LinkClient, LinkRefused
from llm_datadist.engine.link_state import LinkState
from llm_datadist.engine.link_table import MAX_LINKS, LinkTable
from llm_datadist.roles import LLMRole
from llm_datadist.status import LLMStatusCode

_log = logging.getLogger("llm_datadist.link")

MAX_CLUSTERS_A_CALL = 16  # documented

LinkResult = tuple[LLMStatusCode, list[LLMStatusCode]]

_SUCCESS = LLMStatusCode.LLM_SUCCESS


class LinkCalls:
    """Link and unlink calls, one at a time; checks at any time.

    Parameters
    ----------
    table : LinkTable
        Keeps the links.
    client : LinkClient
        Speaks to the servers.
    """

    def __init__(self, table: LinkTable, client: LinkClient) -> None:
        self._table = table
        self._client = client
        self._running = threading.Lock()  # held by the link or unlink call that runs

    def link(self, clusters: Sequence[ClusterAddress], timeout_ms: int, role: LLMRole, num_devices: int) -> LinkResult:
        """Link to each of the clusters at the same time; see ``LLMDataDist.link_clusters`` for the answers."""
        deadline = time.monotonic() + timeout_ms / 1000
        call = "link_clusters"
        if role is not LLMRole.DECODER:
            return _refused(LLMStatusCode.LLM_PARAM_INVALID, call, f"role is {role}, only DECODER links")
        refusal = check_clusters(call, clusters, num_devices) or check_local_addresses(call, clusters)
        return refusal or self._one_at_a_time(call, lambda: self._link(clusters, deadline))

    def unlink(
        self, clusters: Sequence[ClusterAddress], timeout_ms: int, force: bool, role: LLMRole, num_devices: int
    ) -> LinkResult:
        """Take links down; see ``LLMDataDist.unlink_clusters`` for the answers."""
        deadline = time.monotonic() + timeout_ms / 1000
        call = "unlink_clusters"
        refusal = check_clusters(call, clusters, num_devices)
        return refusal or self._one_at_a_time(call, lambda: self._unlink(clusters, deadline, force, role))

    def check(self, cluster_id: int, timeout_ms: int) -> None:
        """Ask the peer whether a link is whole; see ``LLMDataDist.check_link_status``."""
        call = "check_link_status"
        link = self._table.get(call, cluster_id)
        if link.busy:
            raise failure(
                call, LLMStatusCode.LLM_LINK_BUSY, f"a transfer with cluster {cluster_id} is running, try again"
            )
        reason = f"cluster {cluster_id} is dead or has closed the link: unlink, then link again"
        if link.state is LinkState.LINKED:
            try:
                if self._client.probe(link, time.monotonic() + timeout_ms / 1000):
                    return
            except (NoAnswer, Unreachable, MessageError) as error:
                reason = f"{error} (sync_kv_timeout {timeout_ms} ms)"
        raise failure(call, LLMStatusCode.LLM_WAIT_PROCESS_TIMEOUT, reason)

    def _one_at_a_time(self, call: str, run: Callable[[], LinkResult]) -> LinkResult:
        if not self._running.acquire(blocking=False):
            return _refused(LLMStatusCode.LLM_PROCESSING_LINK, call, "another link or unlink call is running")
        try:
            return run()
        finally:
            self._running.release()

    def exclude(self, call: str, run: Callable[[], None]) -> None:
        """Run something that no link or unlink call may run beside.

        Raises
        ------
        LLMException
            LLM_PROCESSING_LINK: one is running.
        """
        if not self._running.acquire(blocking=False):
            raise failure(call, LLMStatusCode.LLM_PROCESSING_LINK, "a link or unlink call is running, try again")
        try:
            run()
        finally:
            self._running.release()

    # ---- link

    def _link(self, clusters: Sequence[ClusterAddress], deadline: float) -> LinkResult:
        already = LLMStatusCode.LLM_ALREADY_LINK
        results, todo = answer_at_once(self._table, clusters, lambda _, linked: already if linked else None)
        if len(self._table) + len(todo) > MAX_LINKS:
            _log.error("link_clusters: %d links exist, at most %d are possible", len(self._table), MAX_LINKS)
            code = LLMStatusCode.LLM_PARAM_INVALID
            return code, [code] * len(clusters)
        answers = for_each(results, todo, lambda index: self._link_one(clusters[index], deadline))
        good = (_SUCCESS, LLMStatusCode.LLM_ALREADY_LINK)
        return _SUCCESS if all(code in good for code in answers) else LLMStatusCode.LLM_LINK_FAILED, answers

    def _link_one(self, cluster: ClusterAddress, deadline: float) -> LLMStatusCode:
        try:
            link = self._client.set_up(cluster, LLMRole.DECODER, deadline)
        except LinkRefused as error:
            _log.warning("cannot link to cluster %d: %s", cluster.remote_cluster_id, error)
            return error.code
        self._table.add_opened(link)
        return _SUCCESS

    # ---- unlink

    def _unlink(self, clusters: Sequence[ClusterAddress], deadline: float, force: bool, role: LLMRole) -> LinkResult:
        unknown = LLMStatusCode.LLM_NOT_YET_LINK
        results, todo = answer_at_once(self._table, clusters, lambda _, linked: None if linked else unknown)
        answers = for_each(results, todo, lambda index: self._unlink_one(clusters[index], deadline, force, role))
        good = (_SUCCESS, LLMStatusCode.LLM_NOT_YET_LINK)
        return _SUCCESS if all(code in good for code in answers) else LLMStatusCode.LLM_UNLINK_FAILED, answers

    def _unlink_one(self, cluster: ClusterAddress, deadline: float, force: bool, role: LLMRole) -> LLMStatusCode:
        link = self._table.get("unlink_clusters", cluster.remote_cluster_id)
        if link.address is not None and role is LLMRole.DECODER and not _same_ips(link.address, cluster):
            _log.error("unlink of cluster %d: it was linked at other addresses", link.cluster_id)
            return LLMStatusCode.LLM_PARAM_INVALID
        if not self._table.start_unlink(link):
            _log.warning("unlink of cluster %d: a transfer uses the link, try again", link.cluster_id)
            return LLMStatusCode.LLM_LINK_BUSY
        result = _SUCCESS
        if link.address is not None and not force:
            result = self._client.unlink(link, deadline)
            if result is LLMStatusCode.LLM_LINK_BUSY:
                self._table.keep(link)
                return result
        self._table.remove(link)
        return result


def answer_at_once(
    table: LinkTable,
    clusters: Sequence[ClusterAddress],
    answer: Callable[[ClusterAddress, bool], LLMStatusCode | None],
) -> tuple[list[LLMStatusCode | None], list[int]]:
    """Answer what needs no peer.

    `answer` says what a cluster, linked or not, gets at once; None if there is work to do. Returns the results so far,
    and the indices of the clusters with work.
    """
    results: list[LLMStatusCode | None] = [None] * len(clusters)
    todo: dict[int, int] = {}
    for index, cluster in enumerate(clusters):
        number = cluster.remote_cluster_id
        results[index] = answer(cluster, number in table)
        if results[index] is None and number in todo:
            results[index] = LLMStatusCode.LLM_REPEAT_REQUEST
        elif results[index] is None:
            todo[number] = index
    return results, list(todo.values())


def for_each(
    results: list[LLMStatusCode | None], todo: list[int], work: Callable[[int], LLMStatusCode]
) -> list[LLMStatusCode]:
    """Do the work of several clusters at the same time and fill the results in."""
    if len(todo) == 1:
        results[todo[0]] = work(todo[0])
    elif todo:
        with ThreadPoolExecutor(len(todo), "llm_datadist-link") as pool:
            for index, result in zip(todo, pool.map(work, todo)):
                results[index] = result
    return [code for code in results if code is not None]


def _refused(code: LLMStatusCode, call: str, reason: str) -> LinkResult:
    _log.error("%s: %s", call, reason)
    return code, []


def check_clusters(call: str, clusters: Sequence[ClusterAddress], num_devices: int) -> LinkResult | None:
    """Refuse a call whose clusters cannot be meant; None if they can."""
    invalid = LLMStatusCode.LLM_PARAM_INVALID
    for cluster in clusters:
        name, local, remote = f"cluster {cluster.remote_cluster_id}", len(cluster.local), len(cluster.remote)
        if not local or not remote:
            reason = f"{name} lacks local or remote addresses, append one of each for every device"
            return _refused(invalid, call, reason)
        if not local == remote == num_devices:
            reason = f"{name} has {local} local and {remote} remote addresses for {num_devices} devices"
            return _refused(invalid, call, reason)
    return refuse_number_of_clusters(call, clusters)


def refuse_number_of_clusters(call: str, clusters: Sequence[ClusterAddress]) -> LinkResult | None:
    """Refuse a call with no clusters or too many; None if their number is right."""
    if not clusters:
        return _refused(LLMStatusCode.LLM_PARAM_INVALID, call, "no clusters given")
    if len(clusters) > MAX_CLUSTERS_A_CALL:
        reason = f"{len(clusters)} clusters in one call, at most {MAX_CLUSTERS_A_CALL}"
        return _refused(LLMStatusCode.LLM_CLUSTER_NUM_EXCEED_LIMIT, call, reason)
    return None


def check_local_addresses(call: str, clusters: Sequence[ClusterAddress]) -> LinkResult | None:
    """Refuse a call whose clusters name different local addresses; None if they do not."""
    for cluster in clusters:
        if _ips(cluster.local) != _ips(clusters[0].local):
            first, other = clusters[0].remote_cluster_id, cluster.remote_cluster_id
            reason = f"clusters {first} and {other} name different local addresses"
            return _refused(LLMStatusCode.LLM_PARAM_INVALID, call, reason)
    return None


def _ips(addresses: tuple[tuple[int | str, int], ...]) -> list[int | str]:
    return [ip for ip, _ in addresses]


def _same_ips(linked: ClusterAddress, given: ClusterAddress) -> bool:
    return _ips(linked.local) == _ips(given.local) and _ips(linked.remote) == _ips(given.remote)
