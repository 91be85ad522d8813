"""Links in cache-manager mode: one-sided and through a communicator, to an instance in another process."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from llm_datadist import (
    CacheKeyByIdAndIndex,
    LLMClusterInfo,
    LLMDataDist,
    LLMRole,
    LLMStatusCode,
    RegisterMemStatus,
)
from llm_datadist.introspection import describe_links
from llm_datadist.v2.cache_manager import CacheManager
from tests.conformance import registering
from tests.conformance.backends import BACKENDS, Backend
from tests.conformance.conftest import Start, StartRemote
from tests.conformance.expectations import LINKED, NOT_EXIST, NOT_LINKED, OK, invalid, refused, wait_until
from tests.conformance.registering import RegisteringRemote
from tests.conformance.remote import DECODER, PROMPT, payload_slot
from tests.datadist_member import cluster_info
from tests.peer_engine import rank_table

ALREADY = LLMStatusCode.LLM_ALREADY_LINK
EXIST_LINK = LLMStatusCode.LLM_EXIST_LINK
LINK_FAILED = LLMStatusCode.LLM_LINK_FAILED
MIX = LLMRole.MIX
BACKEND = BACKENDS[0]  # for tensors: in the pool
RANKS = {PROMPT: 0, DECODER: 1}
ENOUGH_S = 20


@pytest.fixture
def remote(start_registering: StartRemote, backend: Backend) -> RegisteringRemote:
    return start_registering(backend, remote_access=True)


@pytest.fixture
def datadist(start_manager: Start, backend: Backend) -> LLMDataDist:
    return start_manager(more=backend.options, remote_access=True)


def info_of(remote: RegisteringRemote) -> LLMClusterInfo:
    return cluster_info(remote.cluster_id, remote.port)


def without_local_address(remote: RegisteringRemote) -> LLMClusterInfo:
    info = LLMClusterInfo()
    info.remote_cluster_id = remote.cluster_id
    info.append_remote_ip_info("127.0.0.1", remote.port)
    return info


def assert_pulls(manager: CacheManager, datadist: LLMDataDist, remote: RegisteringRemote, seed: int = 1) -> None:
    there, mine = remote.register(seed=seed, accessible=None), registering.register(datadist, BACKEND)
    manager.pull_cache(CacheKeyByIdAndIndex(PROMPT, there.cache_id, 1), mine.cache)
    assert mine.slot(3, 0) == payload_slot(seed, 3, 1)


# ---- link


def test_C246_members_link(datadist: LLMDataDist, remote: RegisteringRemote, backend: Backend) -> None:
    there = remote.register(seed=1)
    mine = registering.register(datadist, BACKEND)
    number = datadist.link("pair", RANKS, rank_table(2))
    assert number == 1
    assert datadist.query_register_mem_status(number) is RegisterMemStatus.PREPARING
    theirs = remote.call(registering.datadist_call, "link", "pair", RANKS, rank_table(2))
    wait_until(lambda: datadist.query_register_mem_status(number) is not RegisterMemStatus.PREPARING, ENOUGH_S)
    assert datadist.query_register_mem_status(comm_id=number) is RegisterMemStatus.OK
    assert [link.transport for link in describe_links(datadist)] == [backend.link]
    datadist.cache_manager.pull_cache(CacheKeyByIdAndIndex(PROMPT, there.cache_id, 1), mine.cache)
    assert mine.slot(3, 0) == payload_slot(1, 3, 1)
    datadist.unlink(number)
    refused(NOT_LINKED, datadist.query_register_mem_status, number)
    refused(NOT_LINKED, datadist.unlink, number)
    pull = datadist.cache_manager.pull_cache
    refused(NOT_LINKED, pull, CacheKeyByIdAndIndex(PROMPT, there.cache_id), mine.cache)
    remote.call(registering.datadist_call, "unlink", theirs)
    assert datadist.link("pair", RANKS, rank_table(2)) == 2


def test_C246_members_that_disagree(datadist: LLMDataDist, remote: RegisteringRemote) -> None:
    mine = datadist.link("pair", RANKS, rank_table(2))
    theirs = remote.call(registering.datadist_call, "link", "pair", RANKS, rank_table(3))
    wait_until(lambda: datadist.query_register_mem_status(mine) is RegisterMemStatus.FAILED, ENOUGH_S)
    query = ("query_register_mem_status", theirs)
    wait_until(lambda: remote.call(registering.datadist_call, *query) is RegisterMemStatus.FAILED, ENOUGH_S)


def test_C240_registering_after_link(datadist: LLMDataDist, remote: RegisteringRemote) -> None:
    """What is registered after `link` is for this process alone."""
    mine = registering.register(datadist, BACKEND)
    datadist.link("pair", RANKS, rank_table(2))
    assert remote.register(seed=1, accessible=True)
    number = remote.call(registering.datadist_call, "link", "pair", RANKS, rank_table(2))
    query = ("query_register_mem_status", number)
    wait_until(lambda: remote.call(registering.datadist_call, *query) is RegisterMemStatus.OK, ENOUGH_S)
    for call in ({}, {"blocks": True}):
        invalid(registering.register, datadist, BACKEND, accessible=True, **call, match="after link")
    with pytest.raises(TypeError):  # types come first
        registering.register(datadist, BACKEND, accessible=1)  # type: ignore[arg-type]
    for accessible in (None, False):
        later = registering.register(datadist, BACKEND, seed=2, accessible=accessible)
        target = remote.register(accessible=False)
        key = CacheKeyByIdAndIndex(DECODER, later.cache.cache_id)
        assert remote.outcome("pull_cache", key, target) is NOT_EXIST
        assert remote.outcome("push_cache", key, target) is NOT_EXIST
    assert remote.outcome("pull_cache", CacheKeyByIdAndIndex(DECODER, mine.cache.cache_id), target) is OK


# ---- link_clusters


def test_C247_a_local_address_is_needed(datadist: LLMDataDist, remote: RegisteringRemote) -> None:
    info = without_local_address(remote)
    invalid(datadist.link_clusters, [info], match="local_ip_info_list is empty")
    invalid(datadist.link_clusters, [info_of(remote), info], match="local_ip_info_list is empty")
    assert datadist.unlink_clusters([info]) == LINKED
    assert datadist.link_clusters([info_of(remote)]) == LINKED
    assert datadist.unlink_clusters([info]) == LINKED


def test_C247_unless_the_process_is_described(remote: RegisteringRemote, backend: Backend) -> None:
    datadist = LLMDataDist(MIX, DECODER)
    resources = json.dumps({"version": "1.2", "server_list": []})
    datadist.init({**registering.make_options(remote_access=True), **backend.options, "llm.LocalCommRes": resources})
    try:
        assert datadist.link_clusters([without_local_address(remote)]) == LINKED
        assert_pulls(datadist.cache_manager, datadist, remote)
    finally:
        datadist.finalize()


def test_C247_linked_already(datadist: LLMDataDist, remote: RegisteringRemote) -> None:
    info = info_of(remote)
    assert datadist.link_clusters([info]) == LINKED
    assert datadist.link_clusters((info,)) == (ALREADY, [ALREADY])
    assert_pulls(datadist.cache_manager, datadist, remote)


@pytest.mark.parametrize("force", [False, True])
def test_C247_unlink(datadist: LLMDataDist, remote: RegisteringRemote, force: bool) -> None:
    info = info_of(remote)
    assert datadist.unlink_clusters([info], force=force) == LINKED
    for _ in range(2):
        assert datadist.link_clusters([info]) == LINKED
        assert datadist.unlink_clusters([info], 1000, force) == LINKED
        assert datadist.unlink_clusters([info], force=force) == LINKED
    with pytest.raises(TypeError):
        datadist.unlink_clusters([info], force=1)  # type: ignore[arg-type]


def test_C247_the_last_failure_is_the_overall_result(
    datadist: LLMDataDist, remote: RegisteringRemote, free_port: Callable[[], int]
) -> None:
    nobody, unusable = cluster_info(8, free_port()), cluster_info(9, 1)
    unusable.append_remote_ip_info("127.0.0.1", 2)
    overall, each = datadist.link_clusters([nobody, unusable, info_of(remote)], 5000)
    assert (overall, each) == (
        LLMStatusCode.LLM_PARAM_INVALID,
        [LINK_FAILED, LLMStatusCode.LLM_PARAM_INVALID, OK],
    )
    assert datadist.link_clusters([]) == (LLMStatusCode.LLM_PARAM_INVALID, [])
    nameless = LLMClusterInfo()
    nameless.append_local_ip_info("127.0.0.1", 0)
    with pytest.raises(TypeError):
        datadist.link_clusters([nameless])
    with pytest.raises(TypeError):
        datadist.link_clusters(None)  # type: ignore[arg-type]
    for timeout in (0, -1):
        invalid(datadist.link_clusters, [info_of(remote)], timeout, match="should be greater than 0")


def test_C247_the_peer_is_gone(datadist: LLMDataDist, remote: RegisteringRemote) -> None:
    assert datadist.link_clusters([info_of(remote)]) == LINKED
    remote.call(registering.datadist_call, "finalize")
    failed = LLMStatusCode.LLM_UNLINK_FAILED
    assert datadist.unlink_clusters([info_of(remote)]) in ((failed, [failed]), LINKED)
    assert datadist.unlink_clusters([info_of(remote)]) == LINKED


# ---- switch_role


def test_C248_the_same_role(datadist: LLMDataDist) -> None:
    datadist.switch_role(MIX)
    datadist.switch_role(LLMRole.PROMPT, {})
    datadist.switch_role(LLMRole.PROMPT)
    for arguments in ((1,), (None,), (MIX, []), (MIX, "x")):
        with pytest.raises(TypeError):
            datadist.switch_role(*arguments)  # type: ignore[arg-type]


def switch(remote: RegisteringRemote, role: LLMRole, port: int | None) -> Any:
    options = None if port is None else {"llm.listenIpInfo": f"127.0.0.1:{port}", "something": "else"}
    return remote.call(registering.datadist_call, "switch_role", role, options)


def test_C248_the_listening_address_moves(
    datadist: LLMDataDist, remote: RegisteringRemote, free_port: Callable[[], int]
) -> None:
    old, new = info_of(remote), cluster_info(PROMPT, free_port())
    switch(remote, MIX, new.remote_ip_info_list[0][1])
    assert datadist.link_clusters([old]) == (LINK_FAILED, [LINK_FAILED])
    assert datadist.link_clusters([new]) == LINKED
    assert_pulls(datadist.cache_manager, datadist, remote)
    assert datadist.unlink_clusters([new]) == LINKED
    switch(remote, LLMRole.DECODER, None)
    assert datadist.link_clusters([new]) == (LINK_FAILED, [LINK_FAILED])
    switch(remote, MIX, remote.port)
    assert datadist.link_clusters([old]) == LINKED


def test_C248_links_are_in_the_way(
    datadist: LLMDataDist, remote: RegisteringRemote, free_port: Callable[[], int]
) -> None:
    assert datadist.link_clusters([info_of(remote)]) == LINKED
    for arguments in ((MIX,), (LLMRole.PROMPT,), (MIX, {"llm.listenIpInfo": f"127.0.0.1:{free_port()}"})):
        refused(EXIST_LINK, datadist.switch_role, *arguments)
        refused(EXIST_LINK, remote.call, registering.datadist_call, "switch_role", *arguments)
    assert_pulls(datadist.cache_manager, datadist, remote)
    assert datadist.unlink_clusters([info_of(remote)]) == LINKED
    datadist.switch_role(LLMRole.PROMPT)


def test_C248_addresses_that_cannot_be(datadist: LLMDataDist) -> None:
    invalid(datadist.switch_role, MIX, {"llm.listenIpInfo": "127.0.0.1"}, match="ip:port")
    with pytest.raises(RuntimeError, match="Can not parse ip str"):
        datadist.switch_role(MIX, {"llm.listenIpInfo": "abc:1"})
    with pytest.raises(ValueError, match="x"):
        datadist.switch_role(MIX, {"llm.listenIpInfo": "127.0.0.1:x"})
