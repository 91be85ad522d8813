"""Checks of what `LLMDataDist.link` is called with, as far as they need no engine, in the documented order."""

from __future__ import annotations

from llm_datadist.arguments import check_dict, check_isinstance, check_uint32, check_uint64
from llm_datadist.status import InvalidArgument

_MAX_MEMBERS = 4
_NAME_LIMIT = 128  # characters; a name is shorter


def check_member_link(comm_name: str, cluster_rank_info: dict[int, int], rank_table: str) -> None:
    """Check the arguments; `LLMDataDist.link` documents what is raised."""
    check_isinstance("comm_name", comm_name, str, allow_none=False)
    if not 0 < len(comm_name) < _NAME_LIMIT:
        raise InvalidArgument(
            f"comm_name has {len(comm_name)} characters, should have at least one and fewer than {_NAME_LIMIT}"
        )
    check_dict("cluster_rank_info", cluster_rank_info, int, int)
    if len(cluster_rank_info) > _MAX_MEMBERS:
        raise InvalidArgument(f"cluster_rank_info has {len(cluster_rank_info)} members, at most {_MAX_MEMBERS}")
    for cluster_id, rank in cluster_rank_info.items():
        check_uint64("cluster_rank_info cluster id", cluster_id)
        check_uint32("cluster_rank_info rank", rank)
    check_isinstance("rank_table", rank_table, str, allow_none=False)
    if len(cluster_rank_info) < 2:
        raise InvalidArgument(f"cluster_rank_info has {len(cluster_rank_info)} members, should have more than one")
    ranks = list(cluster_rank_info.values())
    if any(rank >= following for rank, following in zip(ranks, ranks[1:])):
        raise InvalidArgument(f"ranks of cluster_rank_info should be in ascending order, but are {ranks}")
