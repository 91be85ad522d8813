"""Checks of what link and unlink calls are called with, in the documented order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Union

from llm_datadist.arguments import check_int32, check_isinstance, check_uint32, check_uint64
from llm_datadist.cluster_info import LLMClusterInfo
from llm_datadist.ip_address import Ip
from llm_datadist.status import InvalidArgument

if TYPE_CHECKING:
    from llm_datadist.engine.link import ClusterAddress

Clusters = Union[list[LLMClusterInfo], tuple[LLMClusterInfo, ...]]


def check_link_arguments(clusters: Clusters, timeout: int) -> None:
    """Check the arguments that `LLMDataDist.link_clusters` and `unlink_clusters` have in common."""
    check_int32("timeout", timeout)
    if timeout <= 0:
        raise InvalidArgument(f"timeout {timeout} should be greater than 0")
    check_isinstance("clusters", clusters, [list, tuple], LLMClusterInfo, allow_none=False)


def cluster_addresses(clusters: Clusters, needs_local: bool = False) -> list[ClusterAddress]:
    """Give what the engine wants to know of each cluster, with `needs_local` one that has a local address."""
    from llm_datadist.engine.link import ClusterAddress

    addresses = []
    for index, cluster in enumerate(clusters):
        if needs_local and not cluster.local_ip_info_list:
            raise InvalidArgument(
                f"local_ip_info_list is empty in clusters[{index}], should have the address of this process unless"
                " llm.LocalCommRes has it"
            )
        addresses.append(
            ClusterAddress(
                check_uint64("remote_cluster_id", cluster.remote_cluster_id),
                _checked(cluster.local_ip_info_list),
                _checked(cluster.remote_ip_info_list),
            )
        )
    return addresses


def _checked(addresses: list[tuple[Ip, int]]) -> tuple[tuple[Ip, int], ...]:
    return tuple((ip if isinstance(ip, str) else check_uint32("ip", ip), port) for ip, port in addresses)
