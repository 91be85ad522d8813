"""LLMConfig: properties and the options that it makes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llm_datadist import LLMConfig, LLMException
from tests.conformance.expectations import invalid


@pytest.fixture
def config() -> LLMConfig:
    return LLMConfig()


def test_C030_a_fresh_configuration(config: LLMConfig) -> None:
    expected = {
        "device_id": None,
        "sync_kv_timeout": None,
        "enable_switch_role": False,
        "ge_options": {},
        "listen_ip_info": "",
        "mem_utilization": 0.95,
        "buf_pool_cfg": "",
        "options": {},
        "cluster_info": "",
        "deploy_res_path": "",
    }
    assert {name: getattr(config, name) for name in expected} == expected
    assert not config.output_max_size
    assert config.generate_options() == {"llm.MemoryUtilization": "0.95"}


def test_C031_always_the_same_dictionary(config: LLMConfig) -> None:
    assert config.generate_options() is config.generate_options() is config.gen_options() is config.options


def test_C032_one_device(config: LLMConfig) -> None:
    config.device_id = 3
    made = config.generate_options()
    assert (made["ge.exec.deviceId"], made["ge.session_device_id"]) == ("3", "3")


@pytest.mark.parametrize("devices", [[0, 1], (0, 1)])
def test_C033_several_devices(config: LLMConfig, devices: Any) -> None:
    config.device_id = devices
    made = config.generate_options()
    assert (made["ge.exec.deviceId"], made["ge.session_device_id"]) == ("0;1", "0")
    assert config.device_id == devices
    assert type(config.device_id) is type(devices)


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (-1, LLMException),
        ([0, -1], LLMException),
        (2**31, ValueError),
        ("0", TypeError),
        (1.0, TypeError),
        ([0, "1"], TypeError),
        ({}, TypeError),
    ],
)
def test_C034_wrong_devices(config: LLMConfig, value: Any, error: type[Exception]) -> None:
    if error is LLMException:
        invalid(setattr, config, "device_id", value)
    else:
        with pytest.raises(error):
            config.device_id = value


@pytest.mark.parametrize("value", [5000, "5000"])
def test_C035_timeout(config: LLMConfig, value: Any) -> None:
    config.sync_kv_timeout = value
    assert config.generate_options()["llm.SyncKvCacheWaitTime"] == "5000"
    assert config.sync_kv_timeout == value


@pytest.mark.parametrize("value", [0, -1, "0", "-1", "abc", "1.5", 2**31, 1.5])
def test_C036_wrong_timeouts(config: LLMConfig, value: Any) -> None:
    expected = {2**31: ValueError, 1.5: TypeError}.get(value, LLMException)
    with pytest.raises(expected):
        config.sync_kv_timeout = value


def test_C037_switching_roles(config: LLMConfig) -> None:
    config.enable_switch_role = False
    assert "llm.EnableSwitchRole" not in config.generate_options()
    config.enable_switch_role = True
    assert config.generate_options()["llm.EnableSwitchRole"] == "1"
    for wrong in (1, "1"):
        with pytest.raises(TypeError, match="only support"):
            config.enable_switch_role = wrong  # type: ignore[assignment]


def test_C038_further_options(config: LLMConfig) -> None:
    config.ge_options = {"ge.flowGraphMemMaxSize": "1024"}
    assert config.generate_options()["ge.flowGraphMemMaxSize"] == "1024"
    for wrong in ({"a": 1}, {1: "a"}, []):
        with pytest.raises(TypeError, match="only support"):
            config.ge_options = wrong  # type: ignore[assignment]


def test_C039_a_property_wins_over_a_further_option(config: LLMConfig) -> None:
    config.device_id = 1
    config.ge_options = {"ge.exec.deviceId": "7"}
    assert config.generate_options()["ge.exec.deviceId"] == "1"


def test_C040_listen_address(config: LLMConfig) -> None:
    config.listen_ip_info = ""
    assert "llm.listenIpInfo" not in config.generate_options()
    for text in ("1.2.3.4:5", "nonsense"):
        config.listen_ip_info = text
        assert config.generate_options()["llm.listenIpInfo"] == text
    with pytest.raises(TypeError, match="only support"):
        config.listen_ip_info = 5  # type: ignore[assignment]


def test_C041_memory_utilization(config: LLMConfig) -> None:
    for value in (0.5, 0.0, 1.0):
        config.mem_utilization = value
        assert config.generate_options()["llm.MemoryUtilization"] == str(value)
    for value in (1.1, -0.1):
        invalid(setattr, config, "mem_utilization", value)
    for wrong in (1, "0.5"):
        with pytest.raises(TypeError, match="only support"):
            config.mem_utilization = wrong  # type: ignore[assignment]


def test_C042_buffer_pool(config: LLMConfig) -> None:
    config.buf_pool_cfg = "{}"
    assert config.generate_options()["llm.BufPoolCfg"] == "{}"
    with pytest.raises(TypeError, match="only support"):
        config.buf_pool_cfg = {}  # type: ignore[assignment]


def test_C043_cluster_info(config: LLMConfig) -> None:
    config.cluster_info = json.dumps({"cluster_id": 1, "listen_ip_info": [{"ip": "1.1.1.1", "port": 26000}]})
    assert json.loads(config.cluster_info)["listen_ip_info"] == [{"ip": 16843009, "port": 26000}]
    with pytest.raises(ValueError, match="Expecting"):
        config.cluster_info = "no JSON"


def test_C044_options_follow_the_properties(config: LLMConfig) -> None:
    for device_id in (1, 2):
        config.device_id = device_id
        assert config.generate_options()["ge.exec.deviceId"] == str(device_id)


# ---- cache-manager mode


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("enable_cache_manager", "llm.EnableCacheManager"),
        ("enable_remote_cache_accessible", "llm.EnableRemoteCacheAccessible"),
    ],
)
def test_C045_switches_of_the_mode(config: LLMConfig, name: str, key: str) -> None:
    assert key not in config.generate_options()
    assert getattr(config, name) is False
    for value, text in ((True, "1"), (False, "0")):
        setattr(config, name, value)
        assert config.generate_options()[key] == text
        assert getattr(config, name) is value
    for wrong in (1, "1"):
        with pytest.raises(TypeError, match="only support"):
            setattr(config, name, wrong)


def test_C046_communication_resources(config: LLMConfig) -> None:
    assert "llm.LocalCommRes" not in config.generate_options()
    assert config.local_comm_res == ""
    config.local_comm_res = ""
    assert config.generate_options()["llm.LocalCommRes"] == ""
    config.local_comm_res = "{}"
    assert config.generate_options()["llm.LocalCommRes"] == config.local_comm_res == "{}"
    with pytest.raises(TypeError, match="only support"):
        config.local_comm_res = {}  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("name", "key"),
    [("rdma_traffic_class", "llm.RdmaTrafficClass"), ("rdma_service_level", "llm.RdmaServiceLevel")],
)
def test_C047_rdma(config: LLMConfig, name: str, key: str) -> None:
    assert getattr(config, name) is None
    assert key not in config.generate_options()
    for value in (0, 100, 2**32 - 1):
        setattr(config, name, value)
        assert config.generate_options()[key] == str(value)
        assert getattr(config, name) == value
    for wrong in (-1, 2**32):
        with pytest.raises(ValueError, match="out of range") as raised:
            setattr(config, name, wrong)
        assert not isinstance(raised.value, LLMException)
    with pytest.raises(TypeError, match="only support"):
        setattr(config, name, "1")


def test_C048_time_and_attempts_of_links(config: LLMConfig) -> None:
    for name, key, good, bad in (
        ("link_retry_count", "llm.LinkRetryCount", (1, 100), (0, 101)),
        ("link_total_time", "llm.LinkTotalTime", (0, 1, 2**32 - 1), (-1, 2**32)),
    ):
        assert key not in config.generate_options()
        for value in good:
            setattr(config, name, value)
            assert config.generate_options()[key] == str(value)
        for value in bad:
            invalid(setattr, config, name, value)
        with pytest.raises(TypeError):
            setattr(config, name, "1")


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("mem_pool_cfg", "llm.MemPoolConfig"),
        ("host_mem_pool_cfg", "llm.HostMemPoolConfig"),
        ("transfer_backend", "llm.TransferBackend"),
        ("global_resource_config", "llm.GlobalResourceConfig"),
    ],
)
def test_C046_other_texts(config: LLMConfig, name: str, key: str) -> None:
    assert getattr(config, name) == ""
    assert key not in config.generate_options()
    setattr(config, name, "{}")
    assert config.generate_options()[key] == getattr(config, name) == "{}"
    with pytest.raises(TypeError, match="only support"):
        setattr(config, name, {})
