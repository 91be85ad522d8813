"""The calls of `LLMDataDist` about communicators: links that every member sets up with the same call."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_datadist.arguments import check_uint64
from llm_datadist.member_link_arguments import check_member_link
from llm_datadist.memory_info import RegisterMemStatus, int_to_mem_status_dict

if TYPE_CHECKING:
    from llm_datadist.engine.engine import Engine


class MemberLinks:
    """Base of `LLMDataDist`. These calls are for the cache-manager mode, without a transfer backend."""

    def link(self, comm_name: str, cluster_rank_info: dict[int, int], rank_table: str) -> int:
        """Join a communicator: its members link to each other.

        Every member calls it with the same arguments, in any order and from any thread. It does not wait for the
        others: `query_register_mem_status` tells when they have exchanged what they have registered, so register
        memory that peers may reach before.

        Parameters
        ----------
        comm_name : str
            Name of the communicator, 1 to 127 characters.
        cluster_rank_info : dict of int to int
            Rank of each member by its cluster id, the own one among them: 2 to 4, ranks in ascending order; uint64 and
            uint32.
        rank_table : str
            Rank table in JSON: where the members are. A server that others must reach over TCP is looked up by its name
            now, unless the table gives an address.

        Returns
        -------
        int
            Id of the communicator in this process: 1, 2, 3, ...

        Raises
        ------
        RuntimeError
            The instance is not initialised.
        TypeError
            An argument of the wrong type.
        ValueError
            A cluster id or a rank is out of range.
        LLMException
            LLM_PARAM_INVALID: KV mode, a name of the wrong length, the wrong number or order of members, the own
            cluster is none of them, or the rank table cannot be used. LLM_FEATURE_NOT_ENABLED: there is a transfer
            backend.
        """
        engine = self._require_communicators("link")
        check_member_link(comm_name, cluster_rank_info, rank_table)
        return engine.link_members(comm_name, dict(cluster_rank_info), rank_table)

    def query_register_mem_status(self, comm_id: int) -> RegisterMemStatus:
        """Tell how far the members of a communicator have come.

        Parameters
        ----------
        comm_id : int
            What `link` gave, uint64.

        Returns
        -------
        RegisterMemStatus
            PREPARING until all have exchanged what they have registered, then OK; or FAILED, also if they do not come
            in time.

        Raises
        ------
        RuntimeError
            The instance is not initialised.
        TypeError, ValueError
            The id is no int, or out of range.
        LLMException
            LLM_PARAM_INVALID: KV mode. LLM_NOT_YET_LINK: no such communicator. LLM_FEATURE_NOT_ENABLED: there is a
            transfer backend.
        """
        engine = self._require_communicators("query_register_mem_status")
        check_uint64("comm_id", comm_id)
        return int_to_mem_status_dict.get(engine.member_status(comm_id), RegisterMemStatus.FAILED)

    def unlink(self, comm_id: int) -> None:
        """Leave a communicator.

        Parameters
        ----------
        comm_id : int
            What `link` gave, uint64.

        Raises
        ------
        RuntimeError
            The instance is not initialised.
        TypeError, ValueError
            The id is no int, or out of range.
        LLMException
            LLM_PARAM_INVALID: KV mode. LLM_NOT_YET_LINK: no such communicator. LLM_LINK_BUSY: a transfer uses it.
            LLM_FEATURE_NOT_ENABLED: there is a transfer backend.
        """
        engine = self._require_communicators("unlink")
        check_uint64("comm_id", comm_id)
        engine.unlink_members(comm_id)

    def _require_communicators(self, function: str) -> Engine:
        """Give the engine of an instance that may have communicators."""
        raise NotImplementedError
