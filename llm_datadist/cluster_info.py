"""What a link call says about one remote cluster."""

from __future__ import annotations

from llm_datadist.arguments import check_isinstance, check_uint16, check_uint64
from llm_datadist.ip_address import Ip, find_ip
from llm_datadist.roles import LLMRole


class LLMClusterInfo:
    """One remote cluster for `LLMDataDist.link_clusters` and `LLMDataDist.unlink_clusters`.

    A plain record: it can be used for any number of calls, none of them changes it.

    Examples
    --------
    >>> from llm_datadist import LLMClusterInfo
    >>> prefill = LLMClusterInfo()
    >>> prefill.remote_cluster_id = 1
    >>> prefill.append_local_ip_info("127.0.0.1", 0)
    >>> prefill.append_remote_ip_info("127.0.0.1", 26000)
    >>> prefill.remote_ip_info_list
    [(16777343, 26000)]
    """

    def __init__(self) -> None:
        self._remote_cluster_id: int | None = None
        self._remote_role_type: LLMRole | int | None = None
        self._local_ip_info_list: list[tuple[Ip, int]] = []
        self._remote_ip_info_list: list[tuple[Ip, int]] = []

    @property
    def remote_cluster_id(self) -> int | None:
        """Id of the remote cluster, uint64; None until it is set.

        Raises
        ------
        TypeError, ValueError
            On assignment of another type, or out of range.
        """
        return self._remote_cluster_id

    @remote_cluster_id.setter
    def remote_cluster_id(self, remote_cluster_id: int) -> None:
        self._remote_cluster_id = check_uint64("remote_cluster_id", remote_cluster_id)

    @property
    def remote_role_type(self) -> LLMRole | int | None:
        """Role of the remote cluster, for the program's own use.

        Raises
        ------
        TypeError
            On assignment of something that is no int.
        """
        return self._remote_role_type

    @remote_role_type.setter
    def remote_role_type(self, remote_role_type: LLMRole | int | None) -> None:
        check_isinstance("remote_role_type", remote_role_type, int)
        self._remote_role_type = remote_role_type

    @property
    def local_ip_info_list(self) -> list[tuple[Ip, int]]:
        """Local addresses: integer form (see `trans_str_ip`), or IPv6 text, and port of each device."""
        return self._local_ip_info_list

    @property
    def remote_ip_info_list(self) -> list[tuple[Ip, int]]:
        """Remote addresses: integer form (see `trans_str_ip`), or IPv6 text, and port of each device."""
        return self._remote_ip_info_list

    def append_local_ip_info(self, ip: str | int, port: int) -> None:
        """Add the address of one local device, in device order.

        Parameters
        ----------
        ip : str or int
            IPv4 address as text or in integer form, IPv6 address as text, or the name of a host, which is resolved now.
        port : int
            uint16; 0 if it does not matter, as is usual here.

        Raises
        ------
        TypeError
            Wrong type of `ip` or `port`.
        ValueError
            `port` is out of range.
        RuntimeError
            `ip` is text, but no address, nor a name that can be resolved.
        """
        self._local_ip_info_list.append(_address(ip, port))

    def append_remote_ip_info(self, ip: str | int, port: int) -> None:
        """Add the address that the remote PROMPT listens on for one device, in device order.

        Parameters
        ----------
        ip : str or int
            IPv4 address as text or in integer form, IPv6 address as text, or the name of a host, which is resolved now.
        port : int
            uint16.

        Raises
        ------
        TypeError
            Wrong type of `ip` or `port`.
        ValueError
            `port` is out of range.
        RuntimeError
            `ip` is text, but no address, nor a name that can be resolved.
        """
        self._remote_ip_info_list.append(_address(ip, port))


def _address(ip: str | int, port: int) -> tuple[Ip, int]:
    check_isinstance("ip", ip, [str, int], allow_none=False)
    check_uint16("port", port)
    return find_ip(ip), port
