"""What an initialised instance can tell about itself, beyond the documented interface."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_datadist.arguments import check_isinstance
from llm_datadist.datadist import LLMDataDist

if TYPE_CHECKING:
    from llm_datadist.engine.caches import PoolStatistics
    from llm_datadist.engine.link_table import LinkDescription
    from llm_datadist.roles import LLMRole


def current_role(datadist: LLMDataDist) -> LLMRole:
    """Tell the role of an instance, which `LLMDataDist.switch_role` may have changed.

    Parameters
    ----------
    datadist : LLMDataDist
        An instance, initialised or not.

    Raises
    ------
    TypeError
        `datadist` is no LLMDataDist.

    Examples
    --------
    >>> from llm_datadist import LLMDataDist, LLMRole
    >>> from llm_datadist.introspection import current_role
    >>> print(current_role(LLMDataDist(LLMRole.PROMPT, cluster_id=1)))
    LLMRole.PROMPT
    """
    check_isinstance("datadist", datadist, LLMDataDist, allow_none=False)
    return datadist._role


def pool_statistics(datadist: LLMDataDist) -> PoolStatistics:
    """Tell the level of the memory pool.

    Parameters
    ----------
    datadist : LLMDataDist
        An initialised instance.

    Returns
    -------
    PoolStatistics
        ``capacity``, ``used``, ``free`` and ``largest_free`` in bytes, ``caches`` and ``keys`` as numbers. What peers
        have released by pulling it is counted as free.

    Raises
    ------
    TypeError
        `datadist` is no LLMDataDist.
    RuntimeError
        The instance is not initialised.

    Examples
    --------
    >>> from llm_datadist import CacheDesc, DataType, LLMDataDist, LLMRole
    >>> from llm_datadist.introspection import pool_statistics
    >>> datadist = LLMDataDist(LLMRole.MIX, cluster_id=1)
    >>> datadist.init({"ge.exec.deviceId": "0", "ge.flowGraphMemMaxSize": "65536", "llm.MemoryUtilization": "1.0"})
    >>> cache = datadist.kv_cache_manager.allocate_cache(CacheDesc(2, (4, 128), DataType.DT_FLOAT16))
    >>> level = pool_statistics(datadist)
    >>> level.capacity, level.used, level.free, level.caches
    (65536, 2048, 63488, 1)
    >>> datadist.finalize()
    """
    check_isinstance("datadist", datadist, LLMDataDist, allow_none=False)
    return datadist._require_engine().statistics()


def describe_links(datadist: LLMDataDist) -> list[LinkDescription]:
    """List the links of an instance, also broken ones.

    Parameters
    ----------
    datadist : LLMDataDist
        An initialised instance.

    Returns
    -------
    list of LinkDescription
        ``cluster_id`` of the remote cluster, ``state`` (name of its link state), ``transport`` that was chosen, and
        ``client``: whether this process opened the link.

    Raises
    ------
    TypeError
        `datadist` is no LLMDataDist.
    RuntimeError
        The instance is not initialised.
    """
    check_isinstance("datadist", datadist, LLMDataDist, allow_none=False)
    return datadist._require_engine().describe_links()
