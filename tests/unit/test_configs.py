"""The configuration, and the options that are made of it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llm_datadist import LLMConfig, LLMException, LLMStatusCode, configs

INITIAL = {
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
    "output_max_size": None,
    "enable_cache_manager": False,
    "enable_remote_cache_accessible": False,
    "mem_pool_cfg": "",
    "host_mem_pool_cfg": "",
    "rdma_traffic_class": None,
    "rdma_service_level": None,
    "local_comm_res": "",
    "transfer_backend": "",
    "global_resource_config": "",
    "link_total_time": 0,
    "link_retry_count": 1,
}


def made(**properties: Any) -> dict[str, str]:
    """Options of a fresh configuration with these properties, without the one that is always there."""
    config = LLMConfig()
    for name, value in properties.items():
        setattr(config, name, value)
    return {key: value for key, value in config.generate_options().items() if key != "llm.MemoryUtilization"}


def refused(name: str, value: object) -> LLMStatusCode:
    config = LLMConfig()
    with pytest.raises(LLMException) as caught:
        setattr(config, name, value)
    assert getattr(config, name) == INITIAL[name]
    return caught.value.status_code


def test_a_fresh_configuration() -> None:
    config = LLMConfig()
    assert {name: getattr(config, name) for name in INITIAL} == INITIAL
    assert config.generate_options() == {"llm.MemoryUtilization": "0.95"}


def test_the_module_offers_the_names_that_programs_import() -> None:
    from llm_datadist import LLMClusterInfo, LlmConfig, LLMRole

    assert (configs.LLMRole, configs.LLMClusterInfo, configs.LlmConfig) == (LLMRole, LLMClusterInfo, LlmConfig)
    assert configs.trans_str_ip("1.1.1.1") == 16843009


def test_the_options_are_one_dictionary_that_accumulates() -> None:
    config = LLMConfig()
    config.device_id = 0
    config.listen_ip_info = "1.2.3.4:5"
    options = config.generate_options()
    config.device_id = [3, 1]
    config.listen_ip_info = ""
    assert config.gen_options() is options
    assert config.options is options
    assert options["ge.exec.deviceId"] == "3;1"
    assert options["llm.listenIpInfo"] == "1.2.3.4:5"


@pytest.mark.parametrize("name", [name for name in INITIAL if name != "options"])
def test_options_is_the_only_property_that_cannot_be_assigned(name: str) -> None:
    assert getattr(LLMConfig, name).fset is not None
    with pytest.raises(AttributeError):
        LLMConfig().options = {}  # type: ignore[misc]


@pytest.mark.parametrize(
    ("value", "ids", "first"), [(3, "3", "3"), ([0, 1], "0;1", "0"), ((7, 2), "7;2", "7"), (True, "1", "1")]
)
def test_device_id(value: Any, ids: str, first: str) -> None:
    assert made(device_id=value) == {"ge.exec.deviceId": ids, "ge.session_device_id": first}
    config = LLMConfig()
    config.device_id = value
    assert config.device_id is value


def test_device_id_that_cannot_be_used() -> None:
    assert refused("device_id", -1) == refused("device_id", [0, -1]) == LLMStatusCode.LLM_PARAM_INVALID
    for value in ("0", 1.0, {}, None):
        with pytest.raises(TypeError, match="only support"):
            LLMConfig().device_id = value  # type: ignore[assignment]
    with pytest.raises(TypeError, match="inner type only support"):
        LLMConfig().device_id = [0, "1"]  # type: ignore[list-item]
    with pytest.raises(ValueError, match="out of range"):
        LLMConfig().device_id = 2**31
    with pytest.raises(IndexError):
        made(device_id=[])


@pytest.mark.parametrize("value", [5000, "5000"])
def test_sync_kv_timeout(value: Any) -> None:
    assert made(sync_kv_timeout=value) == {"llm.SyncKvCacheWaitTime": "5000"}
    config = LLMConfig()
    config.sync_kv_timeout = value
    assert config.sync_kv_timeout == value
    assert type(config.sync_kv_timeout) is type(value)


@pytest.mark.parametrize("value", [0, -1, "0", "-1", "abc", "1.5", "", "٣"])
def test_sync_kv_timeout_that_cannot_be_used(value: Any) -> None:
    assert refused("sync_kv_timeout", value) is LLMStatusCode.LLM_PARAM_INVALID


def test_sync_kv_timeout_of_another_type_or_width() -> None:
    for number in (2**31, str(2**31)):
        with pytest.raises(ValueError, match="out of range"):
            LLMConfig().sync_kv_timeout = number
    for value in (1.5, None, [1]):
        with pytest.raises(TypeError, match="only support"):
            LLMConfig().sync_kv_timeout = value  # type: ignore[assignment]


def test_enable_switch_role() -> None:
    assert made(enable_switch_role=True) == {"llm.EnableSwitchRole": "1"}
    assert made(enable_switch_role=False) == {}


def test_ge_options() -> None:
    assert made(ge_options={"ge.flowGraphMemMaxSize": "1024"}) == {"ge.flowGraphMemMaxSize": "1024"}
    with pytest.raises(TypeError, match="dict value only support"):
        LLMConfig().ge_options = {"a": 1}  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="dict key only support"):
        LLMConfig().ge_options = {1: "a"}  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="only support"):
        LLMConfig().ge_options = []  # type: ignore[assignment]


def test_a_property_wins_over_ge_options() -> None:
    ge_options = {"ge.exec.deviceId": "9", "llm.SyncKvCacheWaitTime": "9", "llm.MemoryUtilization": "9", "x": "9"}
    config = LLMConfig()
    config.device_id = 1
    config.sync_kv_timeout = 5
    config.ge_options = ge_options
    for _ in range(2):
        options = config.generate_options()
        assert options["ge.exec.deviceId"] == "1"
        assert options["llm.SyncKvCacheWaitTime"] == "5"
        assert options["llm.MemoryUtilization"] == "0.95"
        assert options["x"] == "9"


def test_listen_ip_info_is_not_looked_into() -> None:
    assert made(listen_ip_info="1.2.3.4:5") == {"llm.listenIpInfo": "1.2.3.4:5"}
    assert made(listen_ip_info="nonsense") == {"llm.listenIpInfo": "nonsense"}
    assert made(listen_ip_info="") == {}


@pytest.mark.parametrize(("value", "text"), [(0.5, "0.5"), (0.0, "0.0"), (1.0, "1.0")])
def test_mem_utilization(value: float, text: str) -> None:
    config = LLMConfig()
    config.mem_utilization = value
    assert config.generate_options()["llm.MemoryUtilization"] == text


def test_mem_utilization_that_cannot_be_used() -> None:
    for value in (1.1, -0.1, float("nan")):
        assert refused("mem_utilization", value) is LLMStatusCode.LLM_PARAM_INVALID
    for other in (1, 0, "0.5"):
        with pytest.raises(TypeError, match="only support float"):
            LLMConfig().mem_utilization = other  # type: ignore[assignment]


def test_cluster_info_gets_integer_addresses() -> None:
    given = {"cluster_id": 1, "listen_ip_info": [{"ip": "1.1.1.1", "port": 5}, {"ip": 7, "port": 6}]}
    config = LLMConfig()
    config.cluster_info = json.dumps(given)
    expected = {"cluster_id": 1, "listen_ip_info": [{"ip": 16843009, "port": 5}, {"ip": 7, "port": 6}]}
    assert json.loads(config.cluster_info) == expected
    assert json.loads(config.generate_options()["llm.ClusterInfo"]) == expected
    with pytest.raises(json.JSONDecodeError):
        config.cluster_info = "{"
    with pytest.raises(RuntimeError, match="Can not parse ip str"):
        config.cluster_info = '{"listen_ip_info": [{"ip": "abc", "port": 5}]}'


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("buf_pool_cfg", "llm.BufPoolCfg"),
        ("deploy_res_path", "llm.deployResPath"),
        ("mem_pool_cfg", "llm.MemPoolConfig"),
        ("host_mem_pool_cfg", "llm.HostMemPoolConfig"),
        ("transfer_backend", "llm.TransferBackend"),
        ("listen_ip_info", "llm.listenIpInfo"),
    ],
)
def test_text_is_written_if_there_is_any(name: str, key: str) -> None:
    assert made(**{name: "text"}) == {key: "text"}
    assert made(**{name: ""}) == made(**{name: None}) == {}


@pytest.mark.parametrize(
    ("name", "key"), [("local_comm_res", "llm.LocalCommRes"), ("global_resource_config", "llm.GlobalResourceConfig")]
)
def test_text_that_means_something_when_it_is_empty(name: str, key: str) -> None:
    assert made(**{name: "text"}) == {key: "text"}
    assert made(**{name: ""}) == {key: ""}
    assert made(**{name: None}) == {}


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("enable_cache_manager", "llm.EnableCacheManager"),
        ("enable_remote_cache_accessible", "llm.EnableRemoteCacheAccessible"),
    ],
)
def test_flags_that_are_written_either_way(name: str, key: str) -> None:
    assert made(**{name: True}) == {key: "1"}
    assert made(**{name: False}) == {key: "0"}
    assert made(**{name: None}) == {}


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("output_max_size", "llm.OutputMaxSize", 100),
        ("rdma_traffic_class", "llm.RdmaTrafficClass", 100),
        ("rdma_service_level", "llm.RdmaServiceLevel", 0),
        ("link_total_time", "llm.LinkTotalTime", 0),
        ("link_total_time", "llm.LinkTotalTime", 2**32 - 1),
        ("link_retry_count", "llm.LinkRetryCount", 1),
        ("link_retry_count", "llm.LinkRetryCount", 100),
    ],
)
def test_numbers_are_written_as_decimals(name: str, key: str, value: int) -> None:
    assert made(**{name: value}) == {key: str(value)}
    for other in ("1", None, 1.0):
        with pytest.raises(TypeError, match="only support int"):
            setattr(LLMConfig(), name, other)


@pytest.mark.parametrize("name", ["rdma_traffic_class", "rdma_service_level"])
def test_numbers_of_rdma_have_a_width(name: str) -> None:
    for value in (-1, 2**32):
        with pytest.raises(ValueError, match="out of range"):
            setattr(LLMConfig(), name, value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("link_retry_count", 0), ("link_retry_count", 101), ("link_total_time", -1), ("link_total_time", 2**32)],
)
def test_numbers_of_links_have_a_range(name: str, value: int) -> None:
    assert refused(name, value) is LLMStatusCode.LLM_PARAM_INVALID


@pytest.mark.parametrize(
    "name", [name for name, value in INITIAL.items() if type(value) in (str, bool) and name != "options"]
)
def test_a_value_of_another_type_is_refused(name: str) -> None:
    config = LLMConfig()
    for value in (5, 0, 1, {}, []):
        with pytest.raises(TypeError, match="only support"):
            setattr(config, name, value)
    with pytest.raises(TypeError, match="only support"):
        setattr(config, name, "1" if isinstance(INITIAL[name], bool) else True)
    assert getattr(config, name) == INITIAL[name]


@pytest.mark.parametrize(
    ("name", "value"),
    [("enable_switch_role", True), ("ge_options", {"a": "b"}), ("mem_utilization", 0.5), ("cluster_info", "{}")],
)
def test_none_takes_a_value_back(name: str, value: object) -> None:
    config = LLMConfig()
    setattr(config, name, value)
    setattr(config, name, None)
    assert getattr(config, name) == INITIAL[name]
    assert config.generate_options() == ({} if name == "mem_utilization" else {"llm.MemoryUtilization": "0.95"})
