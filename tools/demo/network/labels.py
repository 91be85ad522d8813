"""What the services of the demo say about themselves at the registry."""

from __future__ import annotations

from llm_datadist.cluster import MemberInfo

_MODE = "demo"
_NAME = "name"
_SERVICE = "service"


def service_labels(name: str, mode: str, endpoint: str) -> dict[str, str]:
    """Give the labels of a service: its name for people, its mode, and where drivers reach it."""
    return {_MODE: mode, _NAME: name, _SERVICE: endpoint}


def follow_labels(mode: str) -> dict[str, str]:
    """Give the labels that all services of a mode have."""
    return {_MODE: mode}


def name_of(member: MemberInfo) -> str:
    """Give the name of a service."""
    return member.labels.get(_NAME) or f"cluster {member.cluster_id}"


def endpoint_of(member: MemberInfo) -> str | None:
    """Tell where drivers reach a service; None if it does not say."""
    return member.labels.get(_SERVICE)
