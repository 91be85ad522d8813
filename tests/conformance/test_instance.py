"""LLMDataDist without a peer: construction, init, finalize."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from typing import Any

import pytest

from llm_datadist import KvCacheManager, LLMClusterInfo, LLMDataDist, LLMException, LLMRole, LLMStatusCode
from tests.conformance.conftest import Start
from tests.conformance.expectations import LINKED, invalid, refused
from tests.conformance.remote import Remote, link_to
from tests.datadist_member import cluster_info
from tests.own_instance import desc

PROMPT, DECODER = LLMRole.PROMPT, LLMRole.DECODER
Options = Callable[..., dict[str, str]]


def init(role: LLMRole, options: Any, cluster_id: int = 1) -> None:
    LLMDataDist(role, cluster_id).init(options)


def listens(address: str) -> bool:
    ip, port = address.split(":")
    with socket.socket() as probe:
        return probe.connect_ex((ip, int(port))) == 0


def test_C055_arguments_of_the_constructor() -> None:
    for role in (1, "PROMPT", None):
        with pytest.raises(TypeError):
            LLMDataDist(role, 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="out of range"):
        LLMDataDist(PROMPT, -1)
    with pytest.raises(TypeError):
        LLMDataDist(PROMPT, "0")  # type: ignore[arg-type]
    LLMDataDist(PROMPT, 2**64 - 1)


def test_C056_cluster_id() -> None:
    assert LLMDataDist(DECODER, 7).cluster_id == 7


def test_C057_before_init() -> None:
    datadist = LLMDataDist(DECODER, 1)
    calls: list[Callable[[], Any]] = [
        lambda: datadist.kv_cache_manager,
        lambda: datadist.link_clusters([LLMClusterInfo()]),
        lambda: datadist.link_clusters("x", "x"),  # type: ignore[arg-type]
        lambda: datadist.unlink_clusters([LLMClusterInfo()]),
        lambda: datadist.unlink_clusters(None, 0),  # type: ignore[arg-type]
        lambda: datadist.check_link_status(1),
        lambda: datadist.check_link_status("x"),  # type: ignore[arg-type]
        lambda: datadist.switch_role(PROMPT),
        lambda: datadist.switch_role(1, []),  # type: ignore[arg-type]
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="llm datadist is not initialized") as raised:
            call()
        assert not isinstance(raised.value, LLMException)


def test_C058_options_are_a_dict() -> None:
    with pytest.raises(TypeError):
        init(DECODER, [])


@pytest.mark.parametrize("devices", [None, "a", "0;a"])
def test_C059_device_ids(options: Options, devices: str | None) -> None:
    invalid(init, DECODER, options(DECODER, {"ge.exec.deviceId": devices}))


def test_C060_listen_addresses(options: Options) -> None:
    def with_address(address: str | None) -> dict[str, str]:
        return options(PROMPT, {"llm.listenIpInfo": address})

    invalid(init, PROMPT, with_address(None), match="listenIpInfo")
    invalid(init, PROMPT, with_address("127.0.0.1"), match="ip:port")
    with pytest.raises(RuntimeError, match="Can not parse ip str"):
        init(PROMPT, with_address("abc:1"))
    with pytest.raises(ValueError, match="x"):
        init(PROMPT, with_address("127.0.0.1:x"))


def test_C061_one_listen_address_for_two_devices(options: Options) -> None:
    invalid(init, PROMPT, options(PROMPT, {"ge.exec.deviceId": "0;1"}))


def test_C062_a_decoder_does_not_listen(start: Start, options: Options) -> None:
    address = options(PROMPT)["llm.listenIpInfo"]
    datadist = start(DECODER)
    datadist.finalize()
    datadist.init(options(DECODER, {"llm.listenIpInfo": address}))
    assert not listens(address)


def test_C063_memory_of_the_process(options: Options) -> None:
    def with_memory(value: Any) -> dict[str, str]:
        return options(DECODER, {"ge.flowGraphMemMaxSize": value})

    with pytest.raises(TypeError):
        init(DECODER, with_memory(5))
    invalid(init, DECODER, with_memory("1,2"), match="only support one mem pool")
    for wrong in ("1.23", "-1"):
        invalid(init, DECODER, with_memory(wrong))
    datadist = LLMDataDist(DECODER, 1)
    datadist.init(with_memory("1073741824"))
    datadist.finalize()


def test_C064_timeout(options: Options) -> None:
    invalid(init, DECODER, options(DECODER, {"llm.SyncKvCacheWaitTime": "abc"}))


def test_C065_after_a_failed_init(start: Start, options: Options) -> None:
    invalid(init, PROMPT, options(PROMPT, {"llm.SyncKvCacheWaitTime": "abc"}))
    assert LLMDataDist.llm_engine_instance is None
    assert LLMDataDist.llm_engine_instance is not start(PROMPT)


def test_C066_init_of_a_live_instance_does_nothing(start: Start, options: Options) -> None:
    datadist = start(DECODER)
    manager = datadist.kv_cache_manager
    datadist.init(options(DECODER))
    datadist.init("nonsense")  # type: ignore[arg-type]
    assert datadist.kv_cache_manager is manager
    assert manager.allocate_cache(desc(1, [1, 4])).cache_id == 1


def test_C067_one_live_instance_in_a_process(start: Start, options: Options) -> None:
    first, second = start(DECODER), LLMDataDist(PROMPT, 5)
    refused(LLMStatusCode.LLM_FAILED, second.init, options(PROMPT), match="^Cannot init multiple")
    first.kv_cache_manager.allocate_cache(desc(1, [1, 4]))
    first.finalize()
    second.init(options(PROMPT))
    assert LLMDataDist.llm_engine_instance is second
    second.finalize()


def test_C068_init_writes_the_cluster_info(options: Options) -> None:
    given = options(DECODER)
    datadist = LLMDataDist(DECODER, 3)
    datadist.init(given)
    datadist.finalize()
    info = json.loads(given["llm.ClusterInfo"])
    assert info["cluster_id"] == 3
    assert len(info["logic_device_id"]) == 1


def test_C069_one_dictionary_for_two_roles(options: Options, remote_prompt: Remote) -> None:
    given = options(PROMPT)
    for role in (PROMPT, DECODER, PROMPT):
        datadist = LLMDataDist(role, 2)
        datadist.init(given)
        assert listens(given["llm.listenIpInfo"]) is (role is PROMPT)
        if role is DECODER:
            link_to(datadist, remote_prompt)
            datadist.check_link_status(1)
        datadist.finalize()


def test_C070_cluster_info_by_hand(options: Options) -> None:
    given = options(PROMPT)
    ip, port = given.pop("llm.listenIpInfo").split(":")
    info: dict[str, Any] = {"cluster_id": 1, "logic_device_id": ["0:0:0:0"]}
    invalid(init, PROMPT, {**given, "llm.ClusterInfo": "{"})
    invalid(init, PROMPT, {**given, "llm.ClusterInfo": json.dumps(info)})
    number = int.from_bytes(socket.inet_aton(ip), "little")
    info["listen_ip_info"] = [{"ip": number, "port": int(port)}]
    datadist = LLMDataDist(PROMPT, 1)
    datadist.init({**given, "llm.ClusterInfo": json.dumps(info)})
    assert listens(f"{ip}:{port}")
    datadist.finalize()


def test_C071_finalize_without_effect(start: Start) -> None:
    LLMDataDist(PROMPT, 1).finalize()
    datadist = start(PROMPT)
    datadist.finalize()
    datadist.finalize()
    assert LLMDataDist.llm_engine_instance is None


def test_C072_init_and_finalize_ten_times(options: Options) -> None:
    datadist, given = LLMDataDist(PROMPT, 1), options(PROMPT)
    for _ in range(10):
        datadist.init(given)
        assert listens(given["llm.listenIpInfo"])
        datadist.finalize()


def test_C073_after_finalize(start: Start) -> None:
    datadist = start(DECODER)
    manager = datadist.kv_cache_manager
    datadist.finalize()
    assert not manager.is_initialized()
    with pytest.raises(RuntimeError, match="llm datadist is not initialized"):
        _ = datadist.kv_cache_manager
    refused(LLMStatusCode.LLM_FAILED, manager.allocate_cache, desc(1, [1, 4]))


def test_C074_the_manager(start: Start) -> None:
    datadist = start(DECODER)
    assert datadist.kv_cache_manager is datadist.kv_cache_manager
    assert type(datadist.kv_cache_manager) is KvCacheManager
    assert datadist.kv_cache_manager.is_initialized()


def test_C075_two_prompts_at_one_address(options: Options, remote_prompt: Remote, start: Start) -> None:
    taken = options(PROMPT, {"llm.listenIpInfo": f"127.0.0.1:{remote_prompt.port}"})
    with pytest.raises(LLMException):
        init(PROMPT, taken, cluster_id=9)
    decoder = start(DECODER)
    assert decoder.link_clusters([cluster_info(1, remote_prompt.port or 0)]) == LINKED
