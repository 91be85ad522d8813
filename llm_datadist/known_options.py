"""Options that a program may give; a misspelt one is ignored like any other, but not silently."""

from __future__ import annotations

import difflib
import logging

_log = logging.getLogger("llm_datadist")

# Every documented key of the component's own name space, and what this library adds (llm.CopyThreads, llm.Data...,
# llm.DeviceBackend, llm.Transport); other name spaces (ge., hccl.) are the business of others.
_PREFIX = "llm."
_KNOWN = frozenset(
    {
        "llm.BufPoolCfg",
        "llm.ClusterInfo",
        "llm.CopyThreads",
        "llm.DataAddress",
        "llm.DataChecksum",
        "llm.DataPorts",
        "llm.DeviceBackend",
        "llm.EnableCacheManager",
        "llm.EnableRemoteCacheAccessible",
        "llm.EnableSwitchRole",
        "llm.GlobalResourceConfig",
        "llm.HostMemPoolConfig",
        "llm.LinkRetryCount",
        "llm.LinkTotalTime",
        "llm.ListenIp",
        "llm.ListenPort",
        "llm.LocalCommRes",
        "llm.MemPoolConfig",
        "llm.MemoryUtilization",
        "llm.OutputMaxSize",
        "llm.RdmaServiceLevel",
        "llm.RdmaTrafficClass",
        "llm.Role",
        "llm.SyncKvCacheWaitTime",
        "llm.TransferBackend",
        "llm.Transport",
        "llm.deployResPath",
        "llm.listenIpInfo",
    }
)


def warn_of_unknown(options: dict[str, str]) -> None:
    """Log a warning for each ``llm.`` option that does not exist, with the name that may have been meant."""
    for key in options:
        if isinstance(key, str) and key.startswith(_PREFIX) and key not in _KNOWN:
            close = difflib.get_close_matches(key[len(_PREFIX) :], [known[len(_PREFIX) :] for known in _KNOWN], 1)
            hint = f", did you mean {_PREFIX}{close[0]}?" if close else ""
            _log.warning("option %s is unknown and ignored%s", key, hint)
