"""LLMClusterInfo: the description of a remote cluster."""

from __future__ import annotations

from typing import Any

import pytest

from llm_datadist import LLMClusterInfo, LLMException


@pytest.fixture
def info() -> LLMClusterInfo:
    return LLMClusterInfo()


def test_C049_a_fresh_description(info: LLMClusterInfo) -> None:
    assert info.remote_cluster_id is None
    assert info.local_ip_info_list == info.remote_ip_info_list == []


def test_C050_cluster_id(info: LLMClusterInfo) -> None:
    for number in (0, 2**64 - 1):
        info.remote_cluster_id = number
        assert info.remote_cluster_id == number
    for number in (-1, 2**64):
        with pytest.raises(ValueError, match="out of range"):
            info.remote_cluster_id = number
    for wrong in ("1", None):
        with pytest.raises(TypeError, match="only support"):
            info.remote_cluster_id = wrong  # type: ignore[assignment]


def test_C051_addresses_as_text(info: LLMClusterInfo) -> None:
    info.append_remote_ip_info("1.1.1.1", 26000)
    info.append_remote_ip_info("127.0.0.1", 1)
    assert info.remote_ip_info_list == [(16843009, 26000), (16777343, 1)]


def test_C052_addresses_as_numbers(info: LLMClusterInfo) -> None:
    info.append_local_ip_info(16885952, 5)
    assert info.local_ip_info_list == [(16885952, 5)]


def test_C053_short_and_wrong_addresses(info: LLMClusterInfo) -> None:
    info.append_local_ip_info("1.1.1", 5)
    assert info.local_ip_info_list == [(int.from_bytes(bytes([1, 1, 0, 1]), "little"), 5)]
    with pytest.raises(RuntimeError, match="Can not parse ip str.*abc") as raised:
        info.append_local_ip_info("abc", 5)
    assert not isinstance(raised.value, LLMException)


@pytest.mark.parametrize(
    ("ip", "port", "error"),
    [
        (1.5, 1, TypeError),
        ([], 1, TypeError),
        ("1.1.1.1", -1, ValueError),
        ("1.1.1.1", 65536, ValueError),
        ("1.1.1.1", "1", TypeError),
        ("1.1.1.1", 0, None),
    ],
)
@pytest.mark.parametrize("side", ["append_local_ip_info", "append_remote_ip_info"])
def test_C054_types_and_widths(info: LLMClusterInfo, side: str, ip: Any, port: Any, error: Any) -> None:
    append = getattr(info, side)
    if error is None:
        append(ip, port)
    else:
        with pytest.raises(error):
            append(ip, port)
    assert len(info.local_ip_info_list + info.remote_ip_info_list) == (error is None)
