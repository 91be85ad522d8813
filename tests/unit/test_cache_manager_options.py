"""From the options dictionary to what an instance in cache-manager mode is made from."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llm_datadist import LLMConfig, LLMException, LLMRole, LLMStatusCode
from llm_datadist.engine.options import CacheManagerOptions, EngineOptions
from llm_datadist.init_options import InitOptions, read_init_options
from llm_datadist.mode_rules import ModeRules

PROMPT, DECODER, MIX = LLMRole.PROMPT, LLMRole.DECODER, LLMRole.MIX
MANAGER = {"llm.EnableCacheManager": "1"}
TABLE = json.dumps({"version": "1.0", "server_list": []})


def read(options: dict[str, Any], role: LLMRole = DECODER) -> InitOptions:
    before = dict(options)
    try:
        return read_init_options(role, 5, options)
    finally:
        assert options == before


def mode(**options: Any) -> CacheManagerOptions:
    """Read options of the mode, named without their prefix; gives what belongs to it alone."""
    found = read({**MANAGER, **{f"llm.{name}": value for name, value in options.items()}}).engine.cache_manager
    assert found is not None
    return found


def refused(match: str, options: dict[str, Any]) -> None:
    with pytest.raises(LLMException, match=match) as caught:
        read(options)
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID


def test_the_least_options() -> None:
    for role in LLMRole:
        assert read(MANAGER, role) == (
            EngineOptions(role, 5, cache_manager=CacheManagerOptions()),
            {},
            ModeRules(cache_manager=True, needs_local_address=True),
        )


def test_all_options() -> None:
    config = LLMConfig()
    config.enable_cache_manager = True
    config.enable_remote_cache_accessible = True
    config.device_id = 3
    config.sync_kv_timeout = 250
    config.enable_switch_role = True
    config.listen_ip_info = "127.1:26000"
    config.mem_pool_cfg = '{"memory_size": 4096, "page_shift": 10}'
    config.host_mem_pool_cfg = '{"memory_size": 8192, "more": 1}'
    config.rdma_traffic_class = 2**32 - 1
    config.rdma_service_level = 100
    config.local_comm_res = TABLE
    config.link_total_time = 30
    config.link_retry_count = 3
    config.global_resource_config = '{"a": 1}'
    config.ge_options = {"ge.flowGraphMemMaxSize": "1048576"}
    options = read(config.generate_options(), MIX)
    assert options.engine == EngineOptions(
        MIX,
        5,
        device_ids=(3,),
        listen=(("127.0.0.1", 26000),),
        sync_kv_timeout_ms=250,
        enable_switch_role=True,
        cache_manager=CacheManagerOptions(
            remote_access=True,
            device_pool_bytes=4096,
            host_pool_bytes=8192,
            device_page_bytes=1 << 10,
            host_page_bytes=1 << 16,
            link_total_time_s=30,
            link_retry_count=3,
        ),
    )
    assert options.entries == {}
    assert options.rules == ModeRules(True, False, needs_local_address=False, listen=("127.0.0.1", 26000))


# ---- which mode


@pytest.mark.parametrize("value", ["0", "2", "", "true"])
def test_only_1_chooses_the_mode(value: str) -> None:
    options = {"llm.EnableCacheManager": value, "ge.exec.deviceId": "0", "llm.MemPoolConfig": "nonsense"}
    assert read(options).engine == EngineOptions(DECODER, 5)
    assert read(options).rules == ModeRules()


def test_communication_resources_choose_the_mode() -> None:
    for text in ("", TABLE):
        options = read({"llm.LocalCommRes": text})
        assert options.engine.cache_manager == CacheManagerOptions(remote_access=True)
        assert options.rules.needs_local_address is not bool(text)
    without = read({"llm.LocalCommRes": "", "llm.EnableRemoteCacheAccessible": "0"})
    assert without.engine.cache_manager == CacheManagerOptions()
    for value in ("0", "2"):
        options = {"llm.LocalCommRes": "", "llm.EnableCacheManager": value}
        refused("llm.EnableCacheManager is not configured", options)  # type: ignore[arg-type]


def test_remote_access_is_off_unless_it_is_1() -> None:
    assert mode(EnableRemoteCacheAccessible="1").remote_access is True
    assert mode(EnableRemoteCacheAccessible="0").remote_access is False
    with pytest.raises(TypeError, match="llm.EnableRemoteCacheAccessible only support str"):
        mode(EnableRemoteCacheAccessible=True)


def test_memory_is_looked_at_before_the_mode() -> None:
    refused("ge.flowGraphMemMaxSize", {"ge.flowGraphMemMaxSize": "x", "llm.TransferBackend": "hixl"})


# ---- transfer backend


def test_what_a_backend_needs_in_order() -> None:
    options = {"llm.TransferBackend": "other", "llm.EnableRemoteCacheAccessible": "0", "ge.exec.deviceId": "0"}
    refused("llm.EnableCacheManager", options)
    refused("llm.EnableCacheManager", {**options, "llm.EnableCacheManager": "0"})
    options["llm.EnableCacheManager"] = "1"
    refused("llm.EnableRemoteCacheAccessible", options)
    del options["llm.EnableRemoteCacheAccessible"]
    refused("llm.listenIpInfo", options)
    refused("llm.listenIpInfo", {**options, "llm.listenIpInfo": ""})
    options["llm.listenIpInfo"] = "127.0.0.1:26000"
    refused("llm.TransferBackend is 'other', should be 'hixl'", options)
    options["llm.TransferBackend"] = "hixl"
    read_options = read(options)
    assert read_options.engine.cache_manager == CacheManagerOptions(remote_access=True, has_backend=True)
    assert read_options.rules == ModeRules(True, True, True, ("127.0.0.1", 26000))


def test_no_backend() -> None:
    assert mode(TransferBackend="").has_backend is False
    with pytest.raises(TypeError, match="llm.TransferBackend only support str"):
        mode(TransferBackend=1)


# ---- addresses and devices


def test_every_role_listens_at_one_address() -> None:
    for role in LLMRole:
        assert read({**MANAGER, "llm.listenIpInfo": "10.0.0.1:1"}, role).engine.listen == (("10.0.0.1", 1),)
    assert read({**MANAGER, "llm.listenIpInfo": "[::1]:5"}).engine.listen == (("::1", 5),)
    assert read({**MANAGER, "llm.listenIpInfo": ""}).engine.listen == ()
    for text in ("127.0.0.1", "127.0.0.1:1:2", "127.0.0.1:1;127.0.0.1:2", "127.0.0.1:1;", "[::1]", "::1:5"):
        refused("ip:port", {**MANAGER, "llm.listenIpInfo": text})
    with pytest.raises(ValueError, match="port"):
        read({**MANAGER, "llm.listenIpInfo": "127.0.0.1:x"})
    with pytest.raises(RuntimeError, match="Can not parse ip str"):
        read({**MANAGER, "llm.listenIpInfo": "256.0.0.1:1"})


def test_one_device() -> None:
    assert read({**MANAGER, "ge.exec.deviceId": "7"}).engine.device_ids == (7,)
    for text in ("0;1", "", "x", "-1"):
        refused("ge.exec.deviceId", {**MANAGER, "ge.exec.deviceId": text})
    with pytest.raises(TypeError, match="ge.exec.deviceId only support str"):
        read({**MANAGER, "ge.exec.deviceId": 0})


# ---- pools


@pytest.mark.parametrize("name", ["MemPoolConfig", "HostMemPoolConfig"])
@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "is no JSON"),
        ("{", "is no JSON"),
        ("[" * 100000, "is no JSON"),
        ("[]", 'should be an object with "memory_size"'),
        ("{}", "memory_size is None"),
        ('{"memory_size": 0}', "memory_size is 0"),
        ('{"memory_size": -1}', "memory_size is -1"),
        ('{"memory_size": true}', "memory_size is True"),
        ('{"memory_size": 1.5}', "memory_size is 1.5"),
        ('{"memory_size": "4096"}', "memory_size is '4096'"),
        ('{"memory_size": 9223372036854775808}', "memory_size is 9223372036854775808"),
        ('{"memory_size": 4096, "page_shift": 9}', r"page_shift is 9, should be an integer in \[10, 31\)"),
        ('{"memory_size": 4096, "page_shift": 31}', "page_shift is 31"),
        ('{"memory_size": 4096, "page_shift": "16"}', "page_shift is '16'"),
        ('{"memory_size": 4096, "page_shift": null}', "page_shift is None"),
        ('{"memory_size": 4096, "page_shift": 16.0}', "page_shift is 16.0"),
    ],
)
def test_a_pool_that_cannot_be_made(name: str, text: str, match: str) -> None:
    refused(f"llm.{name}.*{match}", {**MANAGER, f"llm.{name}": text})


def test_pools() -> None:
    for shift in (10, 30):
        found = mode(MemPoolConfig=json.dumps({"memory_size": 1, "page_shift": shift}))
        assert (found.device_pool_bytes, found.device_page_bytes) == (1, 1 << shift)
    limit = 20 << 30
    assert mode(HostMemPoolConfig=json.dumps({"memory_size": limit})).host_pool_bytes == limit
    refused(f"at most {limit}", {**MANAGER, "llm.HostMemPoolConfig": json.dumps({"memory_size": limit + 1})})
    assert mode(MemPoolConfig=json.dumps({"memory_size": limit + 1})).device_pool_bytes == limit + 1


# ---- the rest


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("LinkTotalTime", ["0", "4294967295"], ["-1", "4294967296", "", "1.5", "x"]),
        ("LinkRetryCount", ["1", "100"], ["0", "101", "-1", ""]),
        ("RdmaTrafficClass", ["0", "100", "4294967295"], ["-1", "4294967296", "x"]),
        ("RdmaServiceLevel", ["0", "4294967295"], ["-1", "4294967296", "x"]),
    ],
)
def test_numbers(name: str, good: list[str], bad: list[str]) -> None:
    for text in good:
        mode(**{name: text})
    for text in bad:
        refused(f"llm.{name}", {**MANAGER, f"llm.{name}": text})
    with pytest.raises(TypeError, match=f"llm.{name} only support str"):
        mode(**{name: 1})


@pytest.mark.parametrize("version", ["1.0", "1.2", "1.3"])
def test_versions_of_communication_resources(version: str) -> None:
    mode(LocalCommRes=json.dumps({"version": version}))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "is no JSON"),
        ("[]", "should be an object"),
        ("5", "should be an object"),
        ("{}", "version None"),
        ('{"version": "1.1"}', "version '1.1'"),
        ('{"version": 1.0}', "version 1.0"),
        ('{"version": ["1.0"]}', "version"),
    ],
)
def test_communication_resources_that_cannot_be_used(text: str, match: str) -> None:
    refused(f"llm.LocalCommRes.*{match}", {"llm.LocalCommRes": text})


def test_the_resources_of_a_backend_are_an_object() -> None:
    for text in ("", "{}"):
        mode(GlobalResourceConfig=text)
    for text in ("{", "[]"):
        refused("llm.GlobalResourceConfig", {**MANAGER, "llm.GlobalResourceConfig": text})


def test_options_of_both_modes_are_checked() -> None:
    refused("llm.EnableSwitchRole", {**MANAGER, "llm.EnableSwitchRole": "x"})
    refused("llm.SyncKvCacheWaitTime", {**MANAGER, "llm.SyncKvCacheWaitTime": "0"})
