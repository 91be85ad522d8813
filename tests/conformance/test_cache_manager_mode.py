"""Cache-manager mode without a peer: how it is chosen, and what it offers."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from llm_datadist import LLMConfig, LLMDataDist, LLMException, LLMRole, LLMStatusCode
from llm_datadist.v2.cache_manager import CacheManager
from tests.conformance.expectations import NOT_LINKED, invalid, refused
from tests.peer_engine import rank_table
from tests.recording_manager import Check, expect_first

OWN = 2  # cluster id of an instance of this process
FAILED = LLMStatusCode.LLM_FAILED
NOT_ENABLED = LLMStatusCode.LLM_FEATURE_NOT_ENABLED


def made(**properties: Any) -> dict[str, str]:
    """Options of a configuration with these properties."""
    config = LLMConfig()
    config.device_id = 0
    for name, value in properties.items():
        setattr(config, name, value)
    return config.generate_options()


@pytest.fixture
def init() -> Any:
    """Initialise an instance of this process with options."""

    def init_one(options: dict[str, str], role: LLMRole = LLMRole.DECODER) -> LLMDataDist:
        datadist = LLMDataDist(role, OWN)
        datadist.init(options)
        return datadist

    yield init_one
    if LLMDataDist.llm_engine_instance is not None:
        LLMDataDist.llm_engine_instance.finalize()


Init = Callable[..., LLMDataDist]


def test_C234_each_mode_has_its_manager(init: Init) -> None:
    datadist = LLMDataDist(LLMRole.MIX, OWN)
    with pytest.raises(RuntimeError, match="llm datadist is not initialized") as raised:
        _ = datadist.cache_manager
    assert not isinstance(raised.value, LLMException)
    in_kv_mode = init(made())
    invalid(lambda: in_kv_mode.cache_manager, match="not supported when llm.EnableCacheManager is not configured")
    in_kv_mode.finalize()
    datadist = init(made(enable_cache_manager=True))
    assert type(datadist.cache_manager) is CacheManager
    assert datadist.cache_manager is datadist.cache_manager
    invalid(lambda: datadist.kv_cache_manager, match="not supported when llm.EnableCacheManager is configured")
    invalid(datadist.check_link_status, 1, match="EnableCacheManager")
    manager = datadist.cache_manager
    datadist.finalize()
    with pytest.raises(RuntimeError, match="llm datadist is not initialized"):
        _ = datadist.cache_manager
    refused(FAILED, manager.unregister_cache, 1)


def test_C234_the_given_options_stay_as_they_are(init: Init) -> None:
    options = made(local_comm_res="")
    before = dict(options)
    init(options)
    assert options == before


@pytest.mark.parametrize("resources", ["", json.dumps({"version": "1.0", "server_list": []})])
def test_C235_communication_resources_choose_the_mode(init: Init, resources: str) -> None:
    manager = init(made(local_comm_res=resources)).cache_manager
    with pytest.raises(TypeError):  # with remote access
        manager.push_cache(None, None)  # type: ignore[arg-type]


def test_C235_communication_resources_without_remote_access(init: Init) -> None:
    manager = init(made(local_comm_res="", enable_remote_cache_accessible=False)).cache_manager
    invalid(manager.push_cache, None, None)


def test_C235_communication_resources_in_the_other_mode(init: Init) -> None:
    options = made(local_comm_res="", enable_cache_manager=False)
    invalid(init, options, match="llm.EnableCacheManager is not configured")
    assert LLMDataDist.llm_engine_instance is None


@pytest.mark.parametrize(
    ("match", "properties"),
    [
        ("EnableCacheManager", {"listen_ip_info": "127.0.0.1:1"}),
        ("EnableCacheManager", {"listen_ip_info": "127.0.0.1:1", "enable_cache_manager": False}),
        (
            "EnableRemoteCacheAccessible",
            {
                "listen_ip_info": "127.0.0.1:1",
                "enable_cache_manager": True,
                "enable_remote_cache_accessible": False,
            },
        ),
        ("listenIpInfo", {"enable_cache_manager": True, "enable_remote_cache_accessible": True}),
        ("listenIpInfo", {"enable_cache_manager": True}),
    ],
)
def test_C236_what_a_backend_needs(init: Init, match: str, properties: dict[str, Any]) -> None:
    invalid(init, made(transfer_backend="hixl", **properties), match=match)


def test_C236_with_a_backend(init: Init, free_port: Callable[[], int]) -> None:
    address = f"127.0.0.1:{free_port()}"
    datadist = init(made(transfer_backend="hixl", enable_cache_manager=True, listen_ip_info=address))
    refused(NOT_ENABLED, datadist.link, "pair", {1: 0, OWN: 1}, rank_table(2))
    refused(NOT_ENABLED, datadist.query_register_mem_status, 1)
    refused(NOT_ENABLED, datadist.unlink, 1)
    refused(NOT_ENABLED, datadist.switch_role, LLMRole.MIX, {"llm.listenIpInfo": f"127.0.0.1:{free_port()}"})
    with pytest.raises(TypeError):  # remote access is on
        datadist.cache_manager.push_cache(None, None)  # type: ignore[arg-type]


LINK_CHECKS: list[Check] = [
    (TypeError, "comm_name only support", "comm_name", None),
    (TypeError, "comm_name only support", "comm_name", 5),
    (LLMException, "comm_name", "comm_name", ""),
    (LLMException, "comm_name", "comm_name", "x" * 128),
    (TypeError, "cluster_rank_info", "cluster_rank_info", [1, OWN]),
    (TypeError, "dict key only support", "cluster_rank_info", {"1": 0, OWN: 1}),
    (TypeError, "dict value only support", "cluster_rank_info", {1: "0", OWN: 1}),
    (LLMException, "5", "cluster_rank_info", {-number: -1 for number in range(5)}),
    (ValueError, "out of range", "cluster_rank_info", {-1: 0, OWN: 1}),
    (ValueError, "out of range", "cluster_rank_info", {2**64: 0, OWN: 1}),
    (ValueError, "out of range", "cluster_rank_info", {1: -1, OWN: 1}),
    (ValueError, "out of range", "cluster_rank_info", {1: 0, OWN: 2**32}),
    (TypeError, "rank_table only support", "rank_table", None),
    (LLMException, "cluster_rank_info", "cluster_rank_info", {OWN: 0}),
    (LLMException, "ascending", "cluster_rank_info", {1: 1, OWN: 0}),
    (LLMException, "ascending", "cluster_rank_info", {1: 0, OWN: 0}),
    (LLMException, "own cluster", "cluster_rank_info", {1: 0, 3: 1}),
    (LLMException, "rank_table", "rank_table", "{"),
]


@pytest.mark.parametrize("row", range(len(LINK_CHECKS)))
def test_C246_arguments_of_link_in_order(init: Init, row: int) -> None:
    datadist = init(made(enable_cache_manager=True))
    good = {"comm_name": "pair", "cluster_rank_info": {1: 0, OWN: 1}, "rank_table": rank_table(2)}
    expect_first(datadist.link, good, LINK_CHECKS, row)


def test_C246_names_of_any_length_but_none(init: Init) -> None:
    datadist = init(made(enable_cache_manager=True))
    ranks = {1: 3, OWN: 2**32 - 1}
    for name in ("x", "x" * 127):
        invalid(datadist.link, name, ranks, rank_table(2), match="rank")  # passes up to the ranks of the table


def test_C246_before_the_arguments(init: Init) -> None:
    calls: list[tuple[str, tuple[Any, ...]]] = [
        ("link", (None, None, None)),
        ("query_register_mem_status", ("1",)),
        ("unlink", ("1",)),
    ]
    datadist = LLMDataDist(LLMRole.MIX, OWN)
    in_kv_mode = init(made())
    for name, arguments in calls:
        with pytest.raises(RuntimeError, match="llm datadist is not initialized"):
            getattr(datadist, name)(*arguments)
        invalid(getattr(in_kv_mode, name), *arguments, match="EnableCacheManager")


def test_C246_unknown_communicators(init: Init) -> None:
    datadist = init(made(enable_cache_manager=True))
    for call in (datadist.unlink, datadist.query_register_mem_status):
        refused(NOT_LINKED, call, 99)
        with pytest.raises(TypeError):
            call("1")
        with pytest.raises(TypeError):
            call(None)
        for number in (-1, 2**64):
            with pytest.raises(ValueError, match="out of range"):
                call(number)
