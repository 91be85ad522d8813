"""What link and unlink calls answer in cache-manager mode, where both ends of a link are equal.

Any role links, to any process that listens. Calls run side by side; only the same cluster in two of them at once is
refused. A link is taken down over its own connection, by either side, so that a process that does not listen hears of
it too.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError

from llm_datadist.engine.link import ClusterAddress, Identity, Link
from llm_datadist.engine.link_calls import (
    LinkResult,
    answer_at_once,
    for_each,
    refuse_number_of_clusters,
)
from llm_datadist.engine.link_client import LinkClient, LinkRefused
from llm_datadist.engine.link_table import LinkTable
from llm_datadist.engine.options import CacheManagerOptions
from llm_datadist.roles import LLMRole
from llm_datadist.status import LLMStatusCode
from llm_datadist.transports import rendezvous

_log = logging.getLogger("llm_datadist.link")

_CROSSING_SECONDS = 0.05  # for the link of the other side to appear; then its call may have ended, and ours goes on

_SUCCESS = LLMStatusCode.LLM_SUCCESS


class PeerLinkCalls:
    """Link and unlink calls of a process in cache-manager mode.

    Parameters
    ----------
    table : LinkTable
        Keeps the links.
    client : LinkClient
        Speaks to the servers.
    identity : Identity
        Of this process.
    options : CacheManagerOptions
        How long and how often a link is tried.
    """

    def __init__(self, table: LinkTable, client: LinkClient, identity: Identity, options: CacheManagerOptions) -> None:
        self._table = table
        self._client = client
        self._identity = identity
        self._total_seconds = options.link_total_time_s or float("inf")
        self._attempts = max(1, options.link_retry_count)

    def link(self, clusters: Sequence[ClusterAddress], timeout_ms: int, role: LLMRole) -> LinkResult:
        """Link to each of the clusters at the same time.

        Returns
        -------
        overall : LLMStatusCode
            The last of the results that is not LLM_SUCCESS. LLM_PARAM_INVALID or LLM_CLUSTER_NUM_EXCEED_LIMIT with no
            results: there are no clusters, or more than 16.
        results : list of LLMStatusCode
            For each cluster, in order: LLM_SUCCESS, LLM_ALREADY_LINK, LLM_REPEAT_REQUEST, LLM_PARAM_INVALID (not
            exactly one remote address, the own cluster id, or 512 links), LLM_PROCESSING_LINK (another call works on
            this cluster), LLM_LINK_FAILED, LLM_TIMEOUT.
        """
        seconds = min(timeout_ms / 1000, self._total_seconds)
        refusal = refuse_number_of_clusters("link_clusters", clusters)
        if refusal is not None:
            return refusal
        results, todo = answer_at_once(self._table, clusters, self._refuse_at_once)
        return _with_overall(for_each(results, todo, lambda index: self._link(clusters[index], seconds, role)))

    def _refuse_at_once(self, cluster: ClusterAddress, linked: bool) -> LLMStatusCode | None:
        number = cluster.remote_cluster_id
        if len(cluster.remote) != 1:
            _log.error("cluster %d has %d remote addresses, give it one", number, len(cluster.remote))
            return LLMStatusCode.LLM_PARAM_INVALID
        if number == self._identity.cluster_id:
            _log.error("cluster %d is this process itself, cluster ids must be unique", number)
            return LLMStatusCode.LLM_PARAM_INVALID
        return None

    def _link(self, cluster: ClusterAddress, seconds: float, role: LLMRole) -> LLMStatusCode:
        start = time.monotonic()
        refusal = self._table.start_opening(cluster.remote_cluster_id)
        if refusal is not None:
            return refusal
        code = LLMStatusCode.LLM_LINK_FAILED
        try:
            for attempt in range(1, self._attempts + 1):
                end = start + seconds * attempt / self._attempts  # each attempt has its part of the time
                try:
                    return self._attempt(cluster, role, end)
                except LinkRefused as error:
                    _log.warning(
                        "cannot link to cluster %d (attempt %d of %d): %s",
                        cluster.remote_cluster_id,
                        attempt,
                        self._attempts,
                        error,
                    )
                    code = _timeout_here(error.code)
                    if error.is_final or attempt == self._attempts:
                        break
                if self._table.wait_for(cluster.remote_cluster_id, end):
                    return _SUCCESS
            return code
        finally:
            self._table.end_opening(cluster.remote_cluster_id)

    def _attempt(self, cluster: ClusterAddress, role: LLMRole, deadline: float) -> LLMStatusCode:
        """Make the link, or wait for that of the other side if it is making one at the same time."""
        while True:
            try:
                link = self._client.set_up(cluster, role, deadline)
            except LinkRefused as error:
                if error.code is not LLMStatusCode.LLM_PROCESSING_LINK:
                    raise
                until = min(deadline, time.monotonic() + _CROSSING_SECONDS)
                if self._table.wait_for(cluster.remote_cluster_id, until):
                    return _SUCCESS
            else:
                self._table.add_opened(link)
                return _SUCCESS

    def unlink(self, clusters: Sequence[ClusterAddress], timeout_ms: int, force: bool) -> LinkResult:
        """Take links down, by either side; addresses do not matter.

        Returns
        -------
        overall : LLMStatusCode
            As of `link`.
        results : list of LLMStatusCode
            For each cluster, in order: LLM_SUCCESS, also if it was not linked; LLM_REPEAT_REQUEST, LLM_LINK_BUSY,
            LLM_PROCESSING_LINK (another call works on this cluster); with this side closed, and only without `force`:
            LLM_UNLINK_FAILED (the peer is gone), LLM_TIMEOUT (it does not answer).
        """
        deadline = time.monotonic() + timeout_ms / 1000
        refusal = refuse_number_of_clusters("unlink_clusters", clusters)
        if refusal is not None:
            return refusal
        results, todo = answer_at_once(self._table, clusters, lambda _, linked: None)
        return _with_overall(for_each(results, todo, lambda index: self._unlink(clusters[index], deadline, force)))

    def _unlink(self, cluster: ClusterAddress, deadline: float, force: bool) -> LLMStatusCode:
        link = self._table.start_unlink_of(cluster.remote_cluster_id)
        if isinstance(link, LLMStatusCode):
            if link is not _SUCCESS:
                _log.warning("unlink of cluster %d: in use (%s), try again", cluster.remote_cluster_id, link)
            return link
        result = _SUCCESS if force else self._ask_peer(link, deadline)
        if result is LLMStatusCode.LLM_LINK_BUSY:
            self._table.keep(link)
        else:
            self._table.remove(link)
        return result

    def _ask_peer(self, link: Link, deadline: float) -> LLMStatusCode:
        """Have the peer take its side of a link down, and tell what came of it."""
        if not link.end.dead:
            self._table.say(link, rendezvous.UNLINK)
            try:
                word = link.farewell.result(max(0.0, deadline - time.monotonic()))
            except FutureTimeoutError:
                _log.warning("unlink of cluster %d: no answer in time, this side is closed", link.cluster_id)
                return LLMStatusCode.LLM_TIMEOUT
            if word == rendezvous.GONE:
                return _SUCCESS
            if word == rendezvous.BUSY:
                _log.warning("unlink of cluster %d: a transfer of the peer uses the link, try again", link.cluster_id)
                return LLMStatusCode.LLM_LINK_BUSY
        _log.warning("unlink of cluster %d: its process is gone, this side is closed", link.cluster_id)
        return LLMStatusCode.LLM_UNLINK_FAILED


def _with_overall(results: list[LLMStatusCode]) -> LinkResult:
    failures = [code for code in results if code is not _SUCCESS]
    return failures[-1] if failures else _SUCCESS, results


def _timeout_here(code: LLMStatusCode) -> LLMStatusCode:
    """Name a timeout as this mode does."""
    return LLMStatusCode.LLM_TIMEOUT if code is LLMStatusCode.LLM_WAIT_PROCESS_TIMEOUT else code
