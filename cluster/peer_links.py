"""Links of this process to members of the cluster, through the public calls of its `LLMDataDist`."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llm_datadist.cluster.member_info import MemberInfo
from llm_datadist.cluster.transfer_gates import TransferGates
from llm_datadist.cluster_info import LLMClusterInfo
from llm_datadist.datadist import LLMDataDist
from llm_datadist.introspection import describe_links
from llm_datadist.status import LLMException, LLMStatusCode

if TYPE_CHECKING:
    from llm_datadist.engine.link_table import LinkDescription

_log = logging.getLogger("llm_datadist.cluster")

MOST_CLUSTERS_A_CALL = 16
_LEAST_CALL_S = 0.2
_BUSY_S = 0.005  # between two tries to take down a link that is in use

LINKED, BROKEN = "LINKED", "BROKEN"

_GOOD = (LLMStatusCode.LLM_SUCCESS, LLMStatusCode.LLM_ALREADY_LINK)


class PeerLinks:
    """The links of one process; calls from several threads follow each other.

    Parameters
    ----------
    datadist : LLMDataDist
        Initialised.
    gates : TransferGates
        Are told which peers are linked.
    local_address : str
        IPv4 address of this process for link calls.
    num_devices : int
        Devices of this process; a peer needs as many.
    """

    def __init__(self, datadist: LLMDataDist, gates: TransferGates, local_address: str, num_devices: int) -> None:
        self._datadist = datadist
        self._gates = gates
        self._num_devices = num_devices
        self._local_address = local_address
        self._calls = threading.Lock()  # one link or unlink call at a time, as the KV mode has it
        self._clusters: dict[int, LLMClusterInfo] = {}  # as they were linked; guarded by the lock above
        self.cache_manager_mode = _is_in_cache_manager_mode(datadist)

    def states(self) -> dict[int, LinkDescription]:
        """Describe every link by its remote cluster id, and tell the gates."""
        found = {link.cluster_id: link for link in describe_links(self._datadist)}
        self._gates.set_linked({cluster_id for cluster_id, link in found.items() if link.state == LINKED})
        return found

    def link(self, peers: Sequence[MemberInfo], timeout_s: float) -> dict[int, LLMStatusCode]:
        """Try once to link to each peer; gives the results by cluster id."""
        deadline = time.monotonic() + timeout_s
        results: dict[int, LLMStatusCode] = {}
        clusters: list[LLMClusterInfo] = []
        for peer in peers:
            try:
                clusters.append(self._cluster(peer))
            except (OSError, RuntimeError, ValueError) as error:
                _log.warning("cannot link to cluster %d at %r: %s", peer.cluster_id, peer.listen_ip_info, error)
                results[peer.cluster_id] = LLMStatusCode.LLM_LINK_FAILED
        with self._calls:
            self._drop_broken(clusters)
            for first in range(0, len(clusters), MOST_CLUSTERS_A_CALL):
                batch = clusters[first : first + MOST_CLUSTERS_A_CALL]
                left_ms = int(max(deadline - time.monotonic(), _LEAST_CALL_S) * 1000)
                overall, each = self._datadist.link_clusters(batch, left_ms)
                for cluster, code in zip(batch, each or [overall] * len(batch)):  # none if nothing was tried
                    assert cluster.remote_cluster_id is not None
                    results[cluster.remote_cluster_id] = code
                    if code in _GOOD:
                        self._clusters[cluster.remote_cluster_id] = cluster
            self.states()
        return results

    def _drop_broken(self, clusters: Sequence[LLMClusterInfo]) -> None:
        """Take down links that are broken: in KV mode they would count as links that exist."""
        wanted = {cluster.remote_cluster_id for cluster in clusters}
        for cluster_id, link in self.states().items():
            if link.state == BROKEN and cluster_id in wanted:
                self._datadist.unlink_clusters([self._linked_cluster(cluster_id)], int(_LEAST_CALL_S * 1000))

    def unlink(self, cluster_ids: Sequence[int], timeout_s: float) -> dict[int, LLMStatusCode]:
        """Try once to take down each link, without force; gives the results by cluster id."""
        results: dict[int, LLMStatusCode] = {}
        deadline = time.monotonic() + timeout_s
        with self._calls:
            for first in range(0, len(cluster_ids), MOST_CLUSTERS_A_CALL):
                batch = cluster_ids[first : first + MOST_CLUSTERS_A_CALL]
                clusters = [self._linked_cluster(cluster_id) for cluster_id in batch]
                left_ms = int(max(deadline - time.monotonic(), _LEAST_CALL_S) * 1000)
                overall, each = self._datadist.unlink_clusters(clusters, left_ms)
                results.update(zip(batch, each or [overall] * len(batch)))
            self.states()
        return results

    def unlink_all(self, cluster_ids: Sequence[int], deadline: float) -> list[int]:
        """Take down links, and wait for transfers that use them; gives the ids of those that could not be."""
        left = list(cluster_ids)
        while left:
            self.unlink(left, max(_LEAST_CALL_S, deadline - time.monotonic()))
            states = self.states()
            left = [cluster_id for cluster_id in left if cluster_id in states]
            if time.monotonic() >= deadline:
                break
            if left:
                threading.Event().wait(_BUSY_S)
        return left

    def _cluster(self, peer: MemberInfo) -> LLMClusterInfo:
        cluster = LLMClusterInfo()
        cluster.remote_cluster_id = peer.cluster_id
        cluster.remote_role_type = peer.role
        addresses = listen_addresses(peer.listen_ip_info)
        if len(addresses) != self._num_devices:
            raise ValueError(f"it has {len(addresses)} addresses for the {self._num_devices} devices of this process")
        for host, port in addresses:
            cluster.append_local_ip_info(self._local_address, 0)
            cluster.append_remote_ip_info(_address(host), port)
        return cluster

    def _linked_cluster(self, cluster_id: int) -> LLMClusterInfo:
        """Give a cluster as it was linked; the addresses of one that the other end has linked to do not matter."""
        cluster = self._clusters.get(cluster_id)
        if cluster is None:
            cluster = LLMClusterInfo()
            cluster.remote_cluster_id = cluster_id
            for _ in range(self._num_devices):
                cluster.append_local_ip_info(self._local_address, 0)
                cluster.append_remote_ip_info(self._local_address, 0)
        return cluster


def is_good(code: LLMStatusCode) -> bool:
    """Whether a peer is linked after a link call with this result."""
    return code in _GOOD


def listen_addresses(listen_ip_info: str) -> list[tuple[str, int]]:
    """Split ``host:port;host:port``.

    Raises
    ------
    ValueError
        An address cannot be read.
    """
    addresses = []
    for entry in listen_ip_info.split(";"):
        host, colon, port = entry.rpartition(":")
        if not colon or not host or not port.isdigit() or not 0 <= int(port) <= 65535:
            raise ValueError(f"cannot read {entry!r} in the address {listen_ip_info!r}, should be host:port")
        addresses.append((host, int(port)))
    return addresses


def _address(host: str) -> str:
    """Give an address for link calls: names are looked up, addresses stay as they are."""
    bare = host.strip("[]")
    try:
        socket.inet_pton(socket.AF_INET6 if ":" in bare else socket.AF_INET, bare)
    except OSError:
        found = socket.getaddrinfo(bare, None, socket.AF_INET, socket.SOCK_STREAM)
        return str(found[0][4][0])
    return bare


def _is_in_cache_manager_mode(datadist: LLMDataDist) -> bool:
    try:
        _ = datadist.cache_manager
    except LLMException:
        return False
    return True
