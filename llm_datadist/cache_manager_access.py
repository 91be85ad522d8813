"""What the parts of `CacheManager` know: the engine, the own cluster, the pools and the way of access."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_datadist.cache_desc import Placement
from llm_datadist.engine_access import EngineAccess
from llm_datadist.status import InvalidArgument

if TYPE_CHECKING:
    from llm_datadist.engine.engine import Engine
    from llm_datadist.engine.options import CacheManagerOptions


class CacheManagerAccess(EngineAccess):
    """Base of the parts that `CacheManager` is put together from.

    Parameters
    ----------
    llm_engine : Engine
        Engine of the instance.
    cluster_id : int
        Cluster of the instance.
    options : CacheManagerOptions
        What the instance was initialised with.
    """

    _engine: Engine

    def __init__(self, llm_engine: Engine, cluster_id: int, options: CacheManagerOptions) -> None:
        super().__init__(llm_engine)
        self._cluster_id = cluster_id
        self._remote_access = options.remote_access
        self._pools = {
            Placement.DEVICE: options.device_pool_bytes > 0,
            Placement.HOST: options.host_pool_bytes > 0,
        }

    def _check_pool(self, placement: Placement) -> None:
        """Check that there is memory of a placement."""
        if not self._pools[placement]:
            option = "llm.MemPoolConfig" if placement is Placement.DEVICE else "llm.HostMemPoolConfig"
            raise InvalidArgument(
                f"you should config memory pool firstly: {option} is needed to allocate with {placement}"
            )
