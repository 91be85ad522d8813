"""What an instance in cache-manager mode offers, checks and asks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from llm_datadist import (
    KvCacheManager,
    LLMClusterInfo,
    LLMDataDist,
    LLMException,
    LLMRole,
    LLMStatusCode,
    RegisterMemStatus,
    datadist,
)
from llm_datadist.v2.cache_manager import CacheManager
from tests.recording_engine import RecordingEngine
from tests.recording_manager import refused

PROMPT, DECODER, MIX = LLMRole.PROMPT, LLMRole.DECODER, LLMRole.MIX
LOOPBACK = 16777343
MANAGER = {"llm.EnableCacheManager": "1"}
BACKEND = {**MANAGER, "llm.TransferBackend": "hixl", "llm.listenIpInfo": "127.0.0.1:26000"}
TABLE = '{"version": "1.0"}'


@pytest.fixture(autouse=True)
def engines(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[RecordingEngine]]:
    """Let instances open recording engines; gives those that were opened."""
    opened: list[RecordingEngine] = []

    def open_engine(options: Any) -> RecordingEngine:
        opened.append(RecordingEngine(options))
        return opened[-1]

    monkeypatch.setattr(datadist, "_open_engine", open_engine)
    yield opened
    datadist._shutdown_handler()


def start(options: dict[str, str] = MANAGER, role: LLMRole = DECODER, cluster_id: int = 5) -> LLMDataDist:
    instance = LLMDataDist(role, cluster_id)
    instance.init(options)
    return instance


def disabled(match: str, function: Any, *args: Any) -> None:
    with pytest.raises(LLMException, match=match) as caught:
        function(*args)
    assert caught.value.status_code is LLMStatusCode.LLM_FEATURE_NOT_ENABLED


def cluster(cluster_id: int | None = 1, local: bool = True) -> LLMClusterInfo:
    info = LLMClusterInfo()
    if cluster_id is not None:
        info.remote_cluster_id = cluster_id
    if local:
        info.append_local_ip_info("127.0.0.1", 0)
    info.append_remote_ip_info("127.0.0.1", 26000)
    return info


# ---- life and modes


@pytest.mark.parametrize("role", LLMRole)
def test_an_instance_has_one_cache_manager(role: LLMRole) -> None:
    options = dict(MANAGER)
    instance = start(options, role, 2**64 - 1)
    assert options == MANAGER, "the dictionary stays as it is"
    assert type(instance.cache_manager) is CacheManager
    assert instance.cache_manager is instance.cache_manager
    assert LLMDataDist.llm_engine_instance is instance
    first = instance.cache_manager
    instance.finalize()
    instance.init(options)
    assert instance.cache_manager is not first


def test_each_mode_refuses_the_calls_of_the_other(engines: list[RecordingEngine]) -> None:
    instance = start()
    match = "is not supported when llm.EnableCacheManager is configured"
    refused(match, lambda: instance.kv_cache_manager)
    refused(match, instance.check_link_status, "1")
    instance.finalize()
    instance.init({"ge.exec.deviceId": "0"})
    match = "is not supported when llm.EnableCacheManager is not configured"
    refused(match, lambda: instance.cache_manager)
    refused(match, instance.link, None, None, None)
    refused(match, instance.query_register_mem_status, None)
    refused(match, instance.unlink, None)
    assert type(instance.kv_cache_manager) is KvCacheManager
    assert [engine.names() for engine in engines] == [["close"], []]


def test_the_mode_changes_with_a_new_init() -> None:
    instance = start()
    instance.finalize()
    options = {"ge.exec.deviceId": "0"}
    instance.init(options)
    assert instance.kv_cache_manager.is_initialized()
    assert options["llm.Role"] == "Decoder"
    instance.finalize()
    instance.init(MANAGER)
    assert instance.cache_manager


def test_before_init_and_after_finalize_there_is_nothing() -> None:
    instance = start()
    instance.finalize()
    calls: list[Any] = [
        lambda: instance.cache_manager,
        lambda: instance.link(None, None, None),  # type: ignore[arg-type]
        lambda: instance.query_register_mem_status("x"),  # type: ignore[arg-type]
        lambda: instance.unlink("x"),  # type: ignore[arg-type]
        lambda: instance.switch_role("x"),  # type: ignore[arg-type]
        lambda: instance.link_clusters(None, "x"),  # type: ignore[arg-type]
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="llm datadist is not initialized") as caught:
            call()
        assert not isinstance(caught.value, LLMException)


def test_a_failed_init_leaves_nothing(engines: list[RecordingEngine]) -> None:
    instance = LLMDataDist(MIX, 5)
    refused("llm.MemPoolConfig", instance.init, {**MANAGER, "llm.MemPoolConfig": "{"})
    assert engines == []
    assert LLMDataDist.llm_engine_instance is None
    instance.init(MANAGER)


# ---- links


def test_links_of_any_role(engines: list[RecordingEngine]) -> None:
    for role in LLMRole:
        instance = start(role=role)
        assert instance.link_clusters([cluster(7)]) == (LLMStatusCode.LLM_SUCCESS, [LLMStatusCode.LLM_SUCCESS])
        instance.unlink_clusters([cluster(7, local=False)], 5, True)
        remote = ((LOOPBACK, 26000),)
        assert engines[-1].calls == [
            ("link", ([(7, ((LOOPBACK, 0),), remote)], 3000)),
            ("unlink", ([(7, (), remote)], 5, True)),
        ]
        instance.finalize()


def test_a_cluster_needs_a_local_address(engines: list[RecordingEngine]) -> None:
    instance = start()
    match = r"local_ip_info_list is empty in clusters\[1\]"
    refused(match, instance.link_clusters, [cluster(1), cluster(None, local=False)])
    with pytest.raises(TypeError, match="remote_cluster_id only support int"):
        instance.link_clusters([cluster(None)])
    with pytest.raises(TypeError, match="clusters only support"):
        instance.link_clusters(None)  # type: ignore[arg-type]
    refused("should be greater than 0", instance.link_clusters, None, 0)
    assert engines[0].calls == []
    instance.finalize()
    instance.init({"llm.LocalCommRes": ""})
    refused("local_ip_info_list is empty", instance.link_clusters, [cluster(1, local=False)])
    instance.finalize()
    instance.init({"llm.LocalCommRes": TABLE})
    instance.link_clusters([cluster(1, local=False)])
    assert engines[-1].names() == ["link"]


# ---- communicators


def test_members_are_linked_asked_about_and_unlinked(engines: list[RecordingEngine]) -> None:
    instance = start()
    members = {5: 0, 2**64 - 1: 7}
    assert instance.link("x" * 127, members, "") == 1
    assert instance.link(comm_name="c", cluster_rank_info={1: 0, 5: 1, 3: 2, 4: 2**32 - 1}, rank_table=TABLE) == 1
    for number, status in ((0, "OK"), (1, "PREPARING"), (2, "FAILED"), (3, "FAILED")):
        engines[0].member_state = number
        assert instance.query_register_mem_status(comm_id=1) is RegisterMemStatus[status]
    instance.unlink(comm_id=2**64 - 1)
    assert engines[0].calls[:2] == [
        ("link_members", ("x" * 127, members, "")),
        ("link_members", ("c", {1: 0, 5: 1, 3: 2, 4: 2**32 - 1}, TABLE)),
    ]
    assert engines[0].calls[-1] == ("unlink_members", (2**64 - 1,))


def test_the_first_wrong_argument_of_link_counts(engines: list[RecordingEngine]) -> None:
    link = start().link
    args: list[Any] = [None, None, None]
    invalid = "invalid"
    steps: list[tuple[int, Any, Any, str]] = [
        (0, None, TypeError, "comm_name only support str"),
        (0, 5, TypeError, "comm_name only support str"),
        (0, "", invalid, "comm_name has 0 characters"),
        (0, "x" * 128, invalid, "comm_name has 128 characters"),
        (1, None, TypeError, "cluster_rank_info only support dict"),
        (1, [(5, 0)], TypeError, "cluster_rank_info only support dict"),
        (1, {"5": -1, 1: -1, 2: -1, 3: -1, 4: -1}, TypeError, "dict key only support int"),
        (1, {5: "0", 1: -1, 2: -1, 3: -1, 4: -1}, TypeError, "dict value only support int"),
        (1, {-1: 0, 1: -1, 2: -1, 3: -1, 4: -1}, invalid, "has 5 members, at most 4"),
        (1, {-1: 0}, ValueError, "cluster id -1 is out of range"),
        (1, {2**64: 0}, ValueError, "cluster id .*is out of range"),
        (1, {1: -1}, ValueError, "rank -1 is out of range"),
        (1, {1: 2**32}, ValueError, "rank .*is out of range"),
        (2, None, TypeError, "rank_table only support str"),
        (2, {}, TypeError, "rank_table only support str"),
        (1, {}, invalid, "has 0 members, should have more than one"),
        (1, {1: 0}, invalid, "has 1 members, should have more than one"),
        (1, {1: 1, 2: 0}, invalid, "ascending order"),
        (1, {1: 0, 2: 1, 3: 1}, invalid, "ascending order"),
    ]
    good = ("c", {1: 0}, TABLE)
    for index, (position, value, error, match) in enumerate(steps):
        if index and steps[index - 1][0] != position:
            args[steps[index - 1][0]] = good[steps[index - 1][0]]
        args[position] = value
        if error is invalid:
            refused(match, link, *args)
        else:
            with pytest.raises(error, match=match) as caught:
                link(*args)
            assert not isinstance(caught.value, LLMException)
    assert engines[0].calls == []


@pytest.mark.parametrize("name", ["query_register_mem_status", "unlink"])
def test_ids_of_communicators(engines: list[RecordingEngine], name: str) -> None:
    call = getattr(start(), name)
    for wrong in (None, "1", 1.0):
        with pytest.raises(TypeError, match="comm_id only support int"):
            call(wrong)
    for number in (-1, 2**64):
        with pytest.raises(ValueError, match="out of range"):
            call(number)
    assert engines[0].calls == []


def test_there_are_no_communicators_beside_a_backend(engines: list[RecordingEngine]) -> None:
    instance = start(BACKEND)
    disabled("llm.TransferBackend", instance.link, None, None, None)
    disabled("llm.TransferBackend", instance.query_register_mem_status, None)
    disabled("llm.TransferBackend", instance.unlink, None)
    assert engines[0].calls == []


# ---- role


def test_a_role_is_a_label_and_the_address_moves(engines: list[RecordingEngine]) -> None:
    instance, options = start(), {"llm.listenIpInfo": "127.0.0.1:5", "more": "x"}
    instance.switch_role(DECODER)
    instance.switch_role(PROMPT, options)
    instance.switch_role(PROMPT, {})
    instance.switch_role(MIX, switch_options=None)
    assert engines[0].calls == [
        ("switch_role", (DECODER, None)),
        ("switch_role", (PROMPT, ("127.0.0.1", 5))),
        ("switch_role", (PROMPT, None)),
        ("switch_role", (MIX, None)),
    ]
    assert options == {"llm.listenIpInfo": "127.0.0.1:5", "more": "x"}
    assert instance.cache_manager


def test_arguments_of_a_switch(engines: list[RecordingEngine]) -> None:
    instance = start()
    for role in (None, 1, "PROMPT"):
        with pytest.raises(TypeError, match="role only support LLMRole"):
            instance.switch_role(role, "x")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="switch_options only support dict"):
        instance.switch_role(DECODER, "x")  # type: ignore[arg-type]
    for text in ("127.0.0.1", "127.0.0.1:1;127.0.0.1:2"):
        refused("ip:port", instance.switch_role, DECODER, {"llm.listenIpInfo": text})
    with pytest.raises(RuntimeError, match="Can not parse ip str"):
        instance.switch_role(DECODER, {"llm.listenIpInfo": "x:1"})
    assert engines[0].calls == []


def test_a_backend_keeps_its_address(engines: list[RecordingEngine]) -> None:
    instance = start(BACKEND)
    instance.switch_role(DECODER)
    instance.switch_role(PROMPT, {"llm.listenIpInfo": "127.0.0.1:26001"})  # which the engine refuses
    assert [args[1] for _, args in engines[0].calls] == [("127.0.0.1", 26000), ("127.0.0.1", 26001)]
