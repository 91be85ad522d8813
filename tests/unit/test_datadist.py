"""What `LLMDataDist` checks before it asks the engine, and what it asks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from llm_datadist import KvCacheManager, LLMClusterInfo, LLMDataDist, LLMException, LLMRole, LLMStatusCode, datadist
from tests.recording_engine import RecordingEngine

LOOPBACK = 16777343


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
    assert LLMDataDist.llm_engine_instance is None


@pytest.fixture
def decoder() -> LLMDataDist:
    instance = LLMDataDist(LLMRole.DECODER, 2)
    instance.init({"ge.exec.deviceId": "0"})
    return instance


def cluster(cluster_id: int | None = 1) -> LLMClusterInfo:
    info = LLMClusterInfo()
    if cluster_id is not None:
        info.remote_cluster_id = cluster_id
    info.append_local_ip_info("127.0.0.1", 0)
    info.append_remote_ip_info("127.0.0.1", 26000)
    return info


def test_arguments_of_the_constructor() -> None:
    bad: list[Any] = [1, "PROMPT", None]
    for role in bad:
        with pytest.raises(TypeError, match="role only support LLMRole"):
            LLMDataDist(role, -1)
    for number in (-1, 2**64):
        with pytest.raises(ValueError, match="cluster_id .*out of range"):
            LLMDataDist(LLMRole.PROMPT, number)
    with pytest.raises(TypeError, match="cluster_id only support int"):
        LLMDataDist(LLMRole.PROMPT, "0")  # type: ignore[arg-type]
    assert LLMDataDist(LLMRole.MIX, 2**64 - 1).cluster_id == 2**64 - 1


def needs_init(instance: LLMDataDist) -> None:
    calls: list[Any] = [
        lambda: instance.kv_cache_manager,
        lambda: instance.link_clusters(None, "x"),  # type: ignore[arg-type]
        lambda: instance.unlink_clusters(None, "x", 1),  # type: ignore[arg-type]
        lambda: instance.check_link_status("x"),  # type: ignore[arg-type]
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="llm datadist is not initialized") as caught:
            call()
        assert not isinstance(caught.value, LLMException)


def test_before_init_and_after_finalize_there_is_nothing(decoder: LLMDataDist) -> None:
    needs_init(LLMDataDist(LLMRole.DECODER, 2))
    decoder.finalize()
    needs_init(decoder)


def test_options_that_are_no_dictionary() -> None:
    bad: list[Any] = [[], None, "x"]
    for options in bad:
        with pytest.raises(TypeError, match="options only support dict"):
            LLMDataDist(LLMRole.DECODER, 2).init(options)


def test_init_opens_one_engine(engines: list[RecordingEngine], decoder: LLMDataDist) -> None:
    decoder.init("nonsense")  # type: ignore[arg-type]
    assert len(engines) == 1
    assert LLMDataDist.llm_engine_instance is decoder
    manager = decoder.kv_cache_manager
    assert type(manager) is KvCacheManager
    assert manager.is_initialized()
    assert decoder.kv_cache_manager is manager


def test_a_second_instance_waits_for_the_first(engines: list[RecordingEngine], decoder: LLMDataDist) -> None:
    second = LLMDataDist(LLMRole.DECODER, 3)
    with pytest.raises(LLMException, match="^Cannot init multiple") as caught:
        second.init("nonsense")  # type: ignore[arg-type]
    assert caught.value.status_code is LLMStatusCode.LLM_FAILED
    decoder.finalize()
    second.init({"ge.exec.deviceId": "0"})
    assert [engine.options.cluster_id for engine in engines] == [2, 3]
    assert [engine.is_open for engine in engines] == [False, True]


def test_the_dictionary_is_written_only_on_success(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(options: Any) -> RecordingEngine:
        raise LLMException("no", status_code=LLMStatusCode.LLM_FAILED)

    options = {"ge.exec.deviceId": "0"}
    instance = LLMDataDist(LLMRole.DECODER, 2)
    with monkeypatch.context() as patch:
        patch.setattr(datadist, "_open_engine", fail)
        with pytest.raises(LLMException, match="no"):
            instance.init(options)
    assert options == {"ge.exec.deviceId": "0"}
    assert LLMDataDist.llm_engine_instance is None
    needs_init(instance)
    instance.init(options)
    assert options["llm.Role"] == "Decoder"
    assert "llm.ClusterInfo" in options


def test_finalize_ends_what_init_began(engines: list[RecordingEngine], decoder: LLMDataDist) -> None:
    LLMDataDist(LLMRole.DECODER, 3).finalize()
    assert engines[0].is_open
    first = decoder.kv_cache_manager
    decoder.finalize()
    decoder.finalize()
    assert engines[0].names() == ["close"]
    assert not first.is_initialized()
    assert LLMDataDist.llm_engine_instance is None
    decoder.init({"ge.exec.deviceId": "0"})
    assert decoder.kv_cache_manager is not first


def test_the_exit_handler_finalizes(
    engines: list[RecordingEngine], decoder: LLMDataDist, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise LLMException("cannot close", status_code=LLMStatusCode.LLM_FAILED)

    engines[0].close = fail  # type: ignore[method-assign]
    with caplog.at_level("WARNING", logger="llm_datadist"):
        datadist._shutdown_handler()
    assert "cannot close" in caplog.text
    needs_init(decoder)
    datadist._shutdown_handler()


def test_a_forked_child_has_no_instance(
    engines: list[RecordingEngine], decoder: LLMDataDist, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: -1)
        needs_init(decoder)
        decoder.finalize()
        datadist._shutdown_handler()
        child = LLMDataDist(LLMRole.DECODER, 3)
        child.init({"ge.exec.deviceId": "0"})
        child.finalize()
    assert [engine.is_open for engine in engines] == [True, False]
    # The child's memory is its own; here both are one.
    LLMDataDist.llm_engine_instance = decoder
    assert decoder.kv_cache_manager.is_initialized()


# ---- links


def test_link_calls_ask_for_plain_addresses(engines: list[RecordingEngine], decoder: LLMDataDist) -> None:
    info = cluster(7)
    info.append_local_ip_info(1, 2)
    assert decoder.link_clusters([info]) == (LLMStatusCode.LLM_SUCCESS, [LLMStatusCode.LLM_SUCCESS])
    decoder.unlink_clusters((info,), timeout=5, force=True)
    decoder.unlink_clusters([], True)
    decoder.check_link_status(7)
    addresses = [(7, ((LOOPBACK, 0), (1, 2)), ((LOOPBACK, 26000),))]
    assert engines[0].calls == [
        ("link", (addresses, 3000)),
        ("unlink", (addresses, 5, True)),
        ("unlink", ([], 1, False)),
        ("check_link", (7,)),
    ]


@pytest.mark.parametrize("name", ["link_clusters", "unlink_clusters"])
def test_arguments_of_link_calls(engines: list[RecordingEngine], decoder: LLMDataDist, name: str) -> None:
    call = getattr(decoder, name)
    for timeout in ("1", 1.0, None):
        with pytest.raises(TypeError, match="timeout only support int"):
            call(None, timeout)
    for timeout in (2**31, -(2**31) - 1):
        with pytest.raises(ValueError, match="out of range") as caught:
            call(None, timeout)
        assert not isinstance(caught.value, LLMException)
    for timeout in (0, -1):
        with pytest.raises(LLMException, match="should be greater than 0") as refused:
            call(None, timeout)
        assert refused.value.status_code is LLMStatusCode.LLM_PARAM_INVALID
    for clusters in (None, cluster(), [1], [cluster(), None], {}):
        with pytest.raises(TypeError, match="clusters .*only support"):
            call(clusters)
    with pytest.raises(TypeError, match="remote_cluster_id only support int"):
        call([cluster(), cluster(None)])
    assert engines[0].calls == []


def test_force_is_checked_after_the_clusters(engines: list[RecordingEngine], decoder: LLMDataDist) -> None:
    with pytest.raises(TypeError, match="clusters"):
        decoder.unlink_clusters(None, force=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="force only support bool"):
        decoder.unlink_clusters([cluster(None)], force=1)  # type: ignore[arg-type]
    decoder.unlink_clusters([], force=None)  # type: ignore[arg-type]
    assert engines[0].calls == [("unlink", ([], 3000, False))]


def test_arguments_of_a_link_check(decoder: LLMDataDist) -> None:
    with pytest.raises(TypeError, match="only support int"):
        decoder.check_link_status("1")  # type: ignore[arg-type]
    for number in (-1, 2**64):
        with pytest.raises(ValueError, match="out of range"):
            decoder.check_link_status(number)
