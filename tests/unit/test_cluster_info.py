"""What a link call says about a remote cluster."""

from __future__ import annotations

from typing import Any

import pytest

from llm_datadist import LLMClusterInfo, LLMException, LLMRole
from llm_datadist.ip_address import find_ip, host_text, split_host_port, trans_str_ip

APPENDERS = ["append_local_ip_info", "append_remote_ip_info"]


def test_a_fresh_description_is_empty() -> None:
    info = LLMClusterInfo()
    assert info.remote_cluster_id is None
    assert info.remote_role_type is None
    assert info.local_ip_info_list == info.remote_ip_info_list == []


def test_the_cluster_id_is_a_uint64() -> None:
    info = LLMClusterInfo()
    for good in (0, 2**64 - 1):
        info.remote_cluster_id = good
        assert info.remote_cluster_id == good
    for bad in (-1, 2**64):
        with pytest.raises(ValueError, match="out of range"):
            info.remote_cluster_id = bad
    for other in ("1", None, 1.0):
        with pytest.raises(TypeError, match="only support"):
            info.remote_cluster_id = other  # type: ignore[assignment]
    assert info.remote_cluster_id == 2**64 - 1


def test_the_role_is_for_the_program() -> None:
    info = LLMClusterInfo()
    info.remote_role_type = LLMRole.PROMPT
    assert info.remote_role_type is LLMRole.PROMPT
    with pytest.raises(TypeError, match="only support"):
        info.remote_role_type = "Prompt"  # type: ignore[assignment]


def test_addresses_are_kept_in_order_and_as_integers() -> None:
    info = LLMClusterInfo()
    info.append_remote_ip_info("1.1.1.1", 26000)
    info.append_remote_ip_info("127.0.0.1", 26001)
    info.append_remote_ip_info(16885952, 65535)
    info.append_local_ip_info("192.168.1.1", 0)
    assert info.remote_ip_info_list == [(16843009, 26000), (16777343, 26001), (16885952, 65535)]
    assert info.local_ip_info_list == [(16885952, 0)]


@pytest.mark.parametrize("append", APPENDERS)
def test_an_address_that_cannot_be_used(append: str) -> None:
    info = LLMClusterInfo()

    def call(ip: Any, port: Any) -> None:
        getattr(info, append)(ip, port)

    for ip in (1.5, ["127.0.0.1"], None):
        with pytest.raises(TypeError, match="only support"):
            call(ip, "1")
    for port in (-1, 65536):
        with pytest.raises(ValueError, match="out of range"):
            call("abc", port)
    with pytest.raises(TypeError, match="only support"):
        call("abc", "1")
    with pytest.raises(RuntimeError, match="Can not parse ip str.*abc") as caught:
        call("abc", 1)
    assert not isinstance(caught.value, LLMException)
    assert info.local_ip_info_list == info.remote_ip_info_list == []


def test_shortened_addresses_are_those_of_inet_aton() -> None:
    assert trans_str_ip("127.1") == trans_str_ip("127.0.0.1") == 16777343
    assert trans_str_ip("1.1.1") == trans_str_ip("1.1.0.1")
    for text in ("", "256.0.0.1", "::1", "1.1.1.1.1", "1\0", "ä"):
        with pytest.raises(RuntimeError, match="Can not parse ip str"):
            trans_str_ip(text)


@pytest.mark.parametrize("text", ["0.0.0.0", "127.0.0.1", "10.20.30.40", "255.255.255.255"])
def test_integers_go_back_to_text(text: str) -> None:
    assert host_text(trans_str_ip(text)) == text


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("10.0.0.1", 0x0100000A),
        ("::1", "::1"),
        ("FD00:0::2", "fd00::2"),
        ("fe80::1%eth0", "fe80::1%eth0"),
        ("localhost", 0x0100007F),
        (5, 5),
    ],
)
def test_what_an_address_may_be(text: str | int, address: str | int) -> None:
    assert find_ip(text) == address
    assert find_ip(find_ip(text)) == address


@pytest.mark.parametrize("text", ["", "abc def", "256.1.1.1", "1.2.3.4.5", "::g", "[::1]", "-a", "a..b", "x" * 300])
def test_what_no_address_is(text: str) -> None:
    with pytest.raises(RuntimeError, match="Can not parse ip str"):
        find_ip(text)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("127.0.0.1:5", ("127.0.0.1", "5")),
        ("[::1]:5", ("::1", "5")),
        ("prompt-0:5", ("prompt-0", "5")),
        ("::1:5", None),
        ("[::1]", None),
        ("[::1:5", None),
        ("[::1]:5:6", None),
        ("127.0.0.1", None),
    ],
)
def test_host_and_port(text: str, parts: tuple[str, str] | None) -> None:
    assert split_host_port(text) == parts
