"""One instance from its making to its end, and link calls that need no peer."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from llm_datadist import (
    BlocksCacheKey,
    CacheKey,
    KvCacheManager,
    LLMClusterInfo,
    LLMDataDist,
    LLMException,
    LLMRole,
    LLMStatusCode,
)
from llm_datadist.datadist import _shutdown_handler
from llm_datadist.introspection import describe_links, pool_statistics
from tests.datadist_member import MIB, cluster_info, make_options
from tests.own_instance import Open, desc, expect
from tests.pair import start_prompt
from tests.processes import Member

P, D, MIX = LLMRole.PROMPT, LLMRole.DECODER, LLMRole.MIX
NO_ID = 2**64 - 1
NOT_INITIALIZED = "llm datadist is not initialized"


# ---- making an instance


@pytest.mark.parametrize(
    ("role", "cluster_id", "error", "text"),
    [
        (1, 0, TypeError, "role only support LLMRole"),
        ("PROMPT", -1, TypeError, "role only support LLMRole"),
        (None, 0, TypeError, "role only support LLMRole"),
        (P, "0", TypeError, "cluster_id only support int"),
        (P, -1, ValueError, "out of range"),
        (P, 2**64, ValueError, "out of range"),
    ],
)
def test_wrong_arguments_of_the_constructor(role: Any, cluster_id: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        LLMDataDist(role, cluster_id)


def test_several_instances_may_exist() -> None:
    assert [LLMDataDist(role, number).cluster_id for role, number in ((P, 0), (D, NO_ID))] == [0, NO_ID]
    with pytest.raises(AttributeError):
        LLMDataDist(P, 0).cluster_id = 1  # type: ignore[misc]


def test_an_instance_that_is_not_initialised(open_datadist: Open) -> None:
    finalised = open_datadist(D)
    finalised.finalize()
    for datadist in (LLMDataDist(P, 0), finalised):
        calls: list[Callable[[], Any]] = [
            lambda datadist=datadist: datadist.kv_cache_manager,  # type: ignore[misc]
            lambda datadist=datadist: datadist.link_clusters("x", "x"),  # type: ignore[misc]
            lambda datadist=datadist: datadist.unlink_clusters("x", "x", "x"),  # type: ignore[misc]
            lambda datadist=datadist: datadist.check_link_status("x"),  # type: ignore[misc]
            lambda datadist=datadist: pool_statistics(datadist),  # type: ignore[misc]
            lambda datadist=datadist: describe_links(datadist),  # type: ignore[misc]
        ]
        for call in calls:
            with pytest.raises(RuntimeError, match=NOT_INITIALIZED) as raised:
                call()
            assert type(raised.value) is RuntimeError


# ---- init and finalize


def test_init_tells_what_the_process_is(free_port: Callable[[], int]) -> None:
    port = free_port()
    options = make_options(P, port=port)
    datadist = LLMDataDist(P, 5)
    datadist.init(options)
    try:
        assert LLMDataDist.llm_engine_instance is datadist
        assert options["llm.Role"] == "Prompt"
        info = json.loads(options["llm.ClusterInfo"])
        assert (info["cluster_id"], info["logic_device_id"]) == (5, ["0:0:0:0"])
        assert info["listen_ip_info"] == [{"ip": 16777343, "port": port}]
    finally:
        datadist.finalize()
    assert LLMDataDist.llm_engine_instance is None


def test_a_dict_is_used_again_for_another_role(free_port: Callable[[], int]) -> None:
    options = make_options(P, port=free_port())
    for role in (D, P, MIX, P):
        datadist = LLMDataDist(role, 1)
        datadist.init(options)
        assert ("listen_ip_info" in json.loads(options["llm.ClusterInfo"])) is (role is P)
        if role is P:
            assert datadist.kv_cache_manager.allocate_cache(desc(1, [1, 4]), [CacheKey(1, 1)]).cache_id == 1
        datadist.finalize()


def test_a_description_of_the_cluster_by_hand(free_port: Callable[[], int]) -> None:
    port = free_port()
    listen = [{"ip": 16777343, "port": port}]
    text = json.dumps({"cluster_id": 1, "logic_device_id": ["0:0:0:0"], "listen_ip_info": listen})
    options = {"llm.ClusterInfo": text, "ge.flowGraphMemMaxSize": str(MIB)}
    datadist = LLMDataDist(P, 1)
    datadist.init(options)
    try:
        assert options["llm.ClusterInfo"] == text
    finally:
        datadist.finalize()


def test_init_again_does_nothing(prompt: LLMDataDist) -> None:
    manager = prompt.kv_cache_manager
    prompt.init("nonsense")  # type: ignore[arg-type]
    assert prompt.kv_cache_manager is manager


def test_one_instance_of_a_process_is_initialised(prompt: LLMDataDist) -> None:
    other = LLMDataDist(D, 2)
    for options in (make_options(D), "nonsense"):
        expect(LLMStatusCode.LLM_FAILED, "^Cannot init multiple", other.init, options)
    assert LLMDataDist.llm_engine_instance is prompt
    assert prompt.kv_cache_manager.allocate_cache(desc(1, [1, 4])).cache_id == 1
    prompt.finalize()
    other.init(make_options(D))
    assert LLMDataDist.llm_engine_instance is other
    other.finalize()


def test_of_many_threads_one_initialises() -> None:
    instances = [LLMDataDist(D, number) for number in range(8)]
    outcomes: list[LLMStatusCode] = []
    start = threading.Barrier(len(instances))

    def run(datadist: LLMDataDist) -> None:
        start.wait(10)
        try:
            datadist.init(make_options(D))
            outcomes.append(LLMStatusCode.LLM_SUCCESS)
        except LLMException as error:
            outcomes.append(error.status_code)

    threads = [threading.Thread(target=run, args=(datadist,)) for datadist in instances]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    live = LLMDataDist.llm_engine_instance
    assert live is not None
    live.finalize()
    assert sorted(outcomes) == [LLMStatusCode.LLM_SUCCESS] + [LLMStatusCode.LLM_FAILED] * 7


@pytest.mark.parametrize(
    ("name", "value", "code", "text"),
    [
        ("llm.listenIpInfo", "", LLMStatusCode.LLM_PARAM_INVALID, "llm.listenIpInfo"),
        ("ge.exec.deviceId", "a", LLMStatusCode.LLM_PARAM_INVALID, "ge.exec.deviceId"),
        ("llm.SyncKvCacheWaitTime", "abc", LLMStatusCode.LLM_PARAM_INVALID, "llm.SyncKvCacheWaitTime"),
        ("llm.TransferBackend", "hixl", LLMStatusCode.LLM_PARAM_INVALID, "llm.EnableCacheManager"),
        ("ge.flowGraphMemMaxSize", "9" * 18, LLMStatusCode.LLM_DEVICE_OUT_OF_MEMORY, "cannot reserve"),
        # Nobody has this address.
        ("llm.listenIpInfo", "192.0.2.1:26000", LLMStatusCode.LLM_FAILED, "cannot listen on 192.0.2.1:26000"),
    ],
)
def test_after_a_failed_init_another_one_works(
    free_port: Callable[[], int], name: str, value: str, code: LLMStatusCode, text: str
) -> None:
    good = make_options(P, port=free_port())
    bad = {**good, name: value}
    datadist = LLMDataDist(P, 1)
    expect(code, text, datadist.init, bad)
    assert bad == {**good, name: value}
    assert LLMDataDist.llm_engine_instance is None
    with pytest.raises(RuntimeError, match=NOT_INITIALIZED):
        datadist.kv_cache_manager  # noqa: B018
    datadist.init(good)
    datadist.finalize()


def test_an_address_that_is_taken(members: Callable[[str], Member], free_port: Callable[[], int]) -> None:
    port = free_port()
    start_prompt(members("first"), port)
    expect(LLMStatusCode.LLM_FAILED, str(port), LLMDataDist(P, 2).init, make_options(P, port=port))
    assert LLMDataDist.llm_engine_instance is None


def test_finalize_may_be_called_at_any_time(open_datadist: Open) -> None:
    LLMDataDist(P, 1).finalize()
    datadist = open_datadist(P)
    datadist.finalize()
    datadist.finalize()
    _shutdown_handler()


def test_ten_lives_on_one_port(free_port: Callable[[], int]) -> None:
    options = make_options(P, port=free_port())
    datadist = LLMDataDist(P, 1)
    managers: list[KvCacheManager] = []
    for _ in range(10):
        datadist.init(options)
        managers.append(datadist.kv_cache_manager)
        assert datadist.kv_cache_manager is managers[-1]
        cache = datadist.kv_cache_manager.allocate_cache(desc(1, [1, 4]), [CacheKey(1, 1)])
        assert cache.cache_id == 1  # ids start anew
        datadist.finalize()
    assert len({id(manager) for manager in managers}) == 10


def test_a_manager_that_outlives_its_instance(open_datadist: Open) -> None:
    datadist = open_datadist(P)
    manager = datadist.kv_cache_manager
    assert type(manager) is KvCacheManager
    assert manager.is_initialized() is True
    cache = manager.allocate_cache(desc(1, [4, 4]), [CacheKey(1, 1)])
    datadist.finalize()
    assert manager.is_initialized() is False
    failed = LLMStatusCode.LLM_FAILED
    expect(failed, "failed, error code is", manager.allocate_cache, desc(1, [4, 4]))
    expect(failed, "failed, error code is", manager.allocate_blocks_cache, desc(1, [4, 4]))
    expect(failed, "failed, error code is", manager.remove_cache_key, CacheKey(1, 1))
    expect(failed, "failed, error code is", manager.get_cache_tensors, cache)
    expect(failed, "failed, error code is", manager.deallocate_cache, cache)
    # The handle of the first life has the id of a cache of the second one, and must leave that alone.
    again = open_datadist(P)
    living = again.kv_cache_manager.allocate_cache(desc(1, [4, 4]))
    assert living.cache_id == cache.cache_id
    del cache
    assert pool_statistics(again).caches == 1


def test_a_pull_of_a_finalised_decoder_fails(open_datadist: Open) -> None:
    datadist = open_datadist(D)
    manager = datadist.kv_cache_manager
    cache = manager.allocate_cache(desc(1, [4, 4]))
    datadist.finalize()
    expect(LLMStatusCode.LLM_FAILED, "pull_cache failed", manager.pull_cache, CacheKey(1, 1), cache)
    expect(LLMStatusCode.LLM_FAILED, "pull_blocks failed", manager.pull_blocks, BlocksCacheKey(1), cache, [0], [0])


LEAVE = """
import os, sys
from llm_datadist import *
datadist = LLMDataDist(LLMRole.PROMPT, 1)
options = {"ge.exec.deviceId": "0", "ge.flowGraphMemMaxSize": "1048576"}
datadist.init({**options, "llm.listenIpInfo": "127.0.0.1:" + sys.argv[1]})
cache = datadist.kv_cache_manager.allocate_cache(CacheDesc(1, [1, 4], DataType.DT_INT8), [CacheKey(1, 1)])
"""

FORK = """
from llm_datadist.introspection import pool_statistics
child = os.fork()
if child == 0:
    try:
        datadist.kv_cache_manager
        os._exit(1)
    except RuntimeError:
        pass
    datadist.finalize()
    del cache
    other = LLMDataDist(LLMRole.DECODER, 2)
    other.init(options)
    own = other.kv_cache_manager.allocate_cache(CacheDesc(1, [1, 4], DataType.DT_INT8))
    sys.exit(0 if own.cache_id == 1 else 2)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
statistics = pool_statistics(datadist)
assert (statistics.caches, statistics.keys) == (1, 1), statistics
"""


@pytest.mark.parametrize("more", ["", FORK], ids=["alone", "with a forked child"])
def test_a_process_may_end_without_finalize(free_port: Callable[[], int], more: str) -> None:
    command = [sys.executable, "-W", "error", "-c", LEAVE + more, str(free_port())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ---- link calls without a peer


def test_wrong_arguments_of_link_calls(decoder: LLMDataDist) -> None:
    info = cluster_info(1, 1)
    nameless = LLMClusterInfo()
    for call in (decoder.link_clusters, decoder.unlink_clusters):
        for timeout in (0, -1):
            expect(LLMStatusCode.LLM_PARAM_INVALID, "should be greater than 0", call, None, timeout)
        for wrong in ("1", 1.0, None):
            with pytest.raises(TypeError, match="timeout only support"):
                call(None, wrong)
        with pytest.raises(ValueError, match="out of range"):
            call(None, 2**31)
        for clusters in (None, info, [1], {1: info}, [info, None]):
            with pytest.raises(TypeError, match="only support"):
                call(clusters)
        with pytest.raises(TypeError, match="remote_cluster_id only support"):
            call([info, nameless])
    for force in (1, "yes"):
        with pytest.raises(TypeError, match="force only support"):
            decoder.unlink_clusters([info], 1000, force)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="clusters only support"):
        decoder.unlink_clusters(None, 1000, 1)  # type: ignore[arg-type]


def test_an_address_in_integer_form_is_a_uint32(decoder: LLMDataDist) -> None:
    info = LLMClusterInfo()
    info.remote_cluster_id = 1
    info.append_local_ip_info("127.0.0.1", 0)
    info.append_remote_ip_info(2**32, 1)
    for call in (decoder.link_clusters, decoder.unlink_clusters):
        with pytest.raises(ValueError, match="ip .* out of range"):
            call([info])


def incomplete(local: int, remote: int) -> LLMClusterInfo:
    info = LLMClusterInfo()
    info.remote_cluster_id = 1
    for _ in range(local):
        info.append_local_ip_info("127.0.0.1", 0)
    for _ in range(remote):
        info.append_remote_ip_info("127.0.0.1", 1)
    return info


@pytest.mark.parametrize("clusters", [[], (), *[[incomplete(*n)] for n in ((0, 1), (1, 0), (1, 2), (2, 1), (2, 2))]])
def test_clusters_without_proper_addresses(decoder: LLMDataDist, clusters: Any) -> None:
    for call in (decoder.link_clusters, decoder.unlink_clusters):
        assert call(clusters) == (LLMStatusCode.LLM_PARAM_INVALID, [])


def test_too_many_clusters(decoder: LLMDataDist) -> None:
    clusters = [cluster_info(number, 1) for number in range(17)]
    for call in (decoder.link_clusters, decoder.unlink_clusters):
        assert call(clusters) == (LLMStatusCode.LLM_CLUSTER_NUM_EXCEED_LIMIT, [])
        assert call([*clusters, incomplete(0, 0)]) == (LLMStatusCode.LLM_PARAM_INVALID, [])


@pytest.mark.parametrize("role", [P, MIX])
def test_only_a_decoder_links(open_datadist: Open, role: LLMRole) -> None:
    datadist = open_datadist(role)
    assert datadist.link_clusters([cluster_info(2, 1)]) == (LLMStatusCode.LLM_PARAM_INVALID, [])
    expect(LLMStatusCode.LLM_PARAM_INVALID, "is not supported by", datadist.check_link_status, 2)


@pytest.mark.parametrize("role", [P, D, MIX])
@pytest.mark.parametrize("force", [False, True, None])
def test_unlinking_what_is_not_linked(open_datadist: Open, role: LLMRole, force: Any) -> None:
    result = open_datadist(role).unlink_clusters((cluster_info(2, 1), cluster_info(2, 1)), 1000, force)
    assert result == (LLMStatusCode.LLM_SUCCESS, [LLMStatusCode.LLM_NOT_YET_LINK] * 2)


def test_checking_what_is_not_linked(decoder: LLMDataDist) -> None:
    expect(LLMStatusCode.LLM_NOT_YET_LINK, "failed, error code is", decoder.check_link_status, 2)
    with pytest.raises(TypeError, match="only support"):
        decoder.check_link_status("1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="out of range"):
        decoder.check_link_status(-1)
