"""Who takes part in a cluster of prefill and decode processes; installed as ``llm_datadist.cluster``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm_datadist.cluster.cluster_member import ClusterMember
    from llm_datadist.cluster.member_info import Change, ChangeKind, MemberInfo
    from llm_datadist.cluster.registry import Registry
    from llm_datadist.cluster.registry_client import RegistryClient, RegistryRefused, RegistryStatus
    from llm_datadist.cluster.role_switch import SwitchPhase

__all__ = [
    "Change",
    "ChangeKind",
    "ClusterMember",
    "MemberInfo",
    "Registry",
    "RegistryClient",
    "RegistryRefused",
    "RegistryStatus",
    "SwitchPhase",
]

_HOMES = {
    "Change": "member_info",
    "ChangeKind": "member_info",
    "ClusterMember": "cluster_member",
    "MemberInfo": "member_info",
    "Registry": "registry",
    "RegistryClient": "registry_client",
    "RegistryRefused": "registry_client",
    "RegistryStatus": "registry_client",
    "SwitchPhase": "role_switch",
}


def __getattr__(name: str) -> Any:
    """Load a name when it is needed: the launcher of a worker needs no ZeroMQ."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
