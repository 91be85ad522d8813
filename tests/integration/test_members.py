"""Two-sided links through communicators: every member joins, in any order, and they are linked."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from llm_datadist import LLMException, LLMRole, LLMStatusCode
from llm_datadist.engine.communicator import MemberStatus
from llm_datadist.engine.engine import Engine
from llm_datadist.engine.members import MAX_COMMUNICATORS
from llm_datadist.engine.network import TRANSPORT
from tests import peer_engine as peer
from tests.many_engines import allow_many_descriptors
from tests.peer_engine import LINKED, assert_pulls, joined, make_engine, own, rank_table
from tests.processes import Member

Members = Callable[[str], Member]
Code = LLMStatusCode

OK, PREPARING, FAILED = MemberStatus.OK, MemberStatus.PREPARING, MemberStatus.FAILED
A, B, C, D = 11, 12, 13, 14  # cluster ids
PAIR = own("pair")


@pytest.fixture(params=["auto", "tcp"], autouse=True)
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the engines of a test are told about the transport, in all of its processes."""
    monkeypatch.setenv(TRANSPORT, request.param)
    return str(request.param)


@pytest.fixture
def processes(members: Members) -> dict[int, Member]:
    """Four processes that do not listen, by cluster id."""
    found = {number: members(f"member-{number}") for number in (A, B, C, D)}
    for number, process in found.items():
        process.call(peer.open_peer, number)
    return found


Processes = dict[int, Member]


@pytest.fixture
def alone() -> Iterator[Engine]:
    with contextlib.closing(make_engine(A)) as engine:
        yield engine


def pair_of(processes: Processes) -> Processes:
    return {number: processes[number] for number in (A, B)}


def code_of(function: Callable[..., object], *args: object) -> Code:
    with pytest.raises(LLMException) as caught:
        function(*args)
    return caught.value.status_code


# ---- joining


WAYS = {
    "auto": ("shared_memory", "same host and network name space"),
    "tcp": ("tcp", "the settings of rank 1 allow tcp alone"),
}


def test_two_members_pull_in_both_directions(processes: Processes, transport: str) -> None:
    pair = pair_of(processes)
    assert joined(pair, PAIR) == {A: 1, B: 1}
    assert pair[A].call(peer.member_links) == [(B, LINKED, 1)]
    assert pair[B].call(peer.member_links) == [(A, LINKED, 1)]
    for process in pair.values():
        assert process.call(peer.ways) == {WAYS[transport]}
    assert_pulls(pair[A], pair[B], B, 1)
    assert_pulls(pair[B], pair[A], A, 2)


@pytest.mark.parametrize("first", [A, B])
def test_a_member_that_comes_later_is_found(first: int, processes: Processes) -> None:
    ranks, second = {A: 0, B: 1}, B if first == A else A
    one = processes[first].call(peer.join, own("late"), ranks)
    assert processes[first].call(peer.status, one) is PREPARING
    other = processes[second].call(peer.join, own("late"), ranks)
    assert processes[second].call(peer.wait_for_status, other)[0] is OK
    assert processes[first].call(peer.wait_for_status, one)[0] is OK


@pytest.mark.parametrize("size", [2, 3, 4])
def test_many_communicators_in_random_order_from_threads(size: int, processes: Processes) -> None:
    """Every process joins all of them at the same time, each in an order of its own."""
    rng = random.Random(size)
    clusters = (A, B, C, D)
    communicators = []
    for number in range(24):
        chosen = rng.sample(clusters, size)
        communicators.append(
            (own(f"communicator {number}"), {cluster_id: rank for rank, cluster_id in enumerate(chosen)})
        )
    calls = {}
    for cluster_id, process in processes.items():
        mine = [entry for entry in communicators if cluster_id in entry[1]]
        rng.shuffle(mine)
        calls[cluster_id] = process.start(peer.join_from_threads, mine)
    for cluster_id, call in calls.items():
        for communicator in call.result().values():
            assert processes[cluster_id].call(peer.wait_for_status, communicator)[0] is OK
    for cluster_id, process in processes.items():
        expected = sum(size - 1 for _, ranks in communicators if cluster_id in ranks)
        links = process.call(peer.member_links)
        assert len(links) == expected
        assert {state for _, state, _ in links} == {LINKED}
    assert_pulls(processes[A], processes[B], B, 1)


def test_the_same_members_in_several_communicators_and_a_link_besides(
    members: Members, free_port: Callable[[], int]
) -> None:
    port = free_port()
    pair = {A: members("a"), B: members("b")}
    pair[A].call(peer.open_peer, A)
    pair[B].call(peer.open_peer, B, port)
    one, two = joined(pair, own("one")), joined(pair, own("two"))
    assert pair[A].call(peer.link, (B, port)) == (Code.LLM_SUCCESS, [Code.LLM_SUCCESS])
    assert pair[A].call(peer.member_links) == [(B, LINKED, 1), (B, LINKED, 2), (B, LINKED, None)]
    pair[A].call(peer.leave, two[A])
    assert pair[A].call(peer.member_links) == [(B, LINKED, 1), (B, LINKED, None)]
    assert_pulls(pair[A], pair[B], B, 1)
    assert pair[B].call(peer.unlink, (A, 1)) == (Code.LLM_SUCCESS, [Code.LLM_SUCCESS])
    assert pair[A].call(peer.member_links) == [(B, LINKED, 1)]
    assert_pulls(pair[B], pair[A], A, 2)
    pair[A].call(peer.leave, one[A])
    assert pair[A].call(peer.member_links) == []


def test_links_of_communicators_hold_the_role(processes: Processes) -> None:
    pair = pair_of(processes)
    ids = joined(pair, PAIR)
    assert code_of(pair[A].call, peer.switch, LLMRole.PROMPT, None) is Code.LLM_EXIST_LINK
    pair[A].call(peer.leave, ids[A])
    pair[A].call(peer.switch, LLMRole.PROMPT, None)


# ---- leaving


def test_a_member_leaves_and_comes_again(processes: Processes) -> None:
    pair = pair_of(processes)
    for _ in range(3):
        ids = joined(pair, PAIR)
        pair[A].call(peer.leave, ids[A])
        assert code_of(pair[A].call, peer.status, ids[A]) is Code.LLM_NOT_YET_LINK
        assert pair[A].call(peer.member_links) == []
        assert pair[B].call(peer.wait_for_status, ids[B])[0] in (OK, FAILED)
        peer.wait_for_links(pair[B], [])
        assert pair[B].call(peer.status, ids[B]) is FAILED, "there is nobody left"
        pair[B].call(peer.leave, ids[B])


@pytest.mark.parametrize("order", [(A, B), (B, A)])
def test_both_join_again_in_any_order_after_one_has_left(order: tuple[int, int], processes: Processes) -> None:
    pair = pair_of(processes)
    ids = joined(pair, PAIR)
    pair[A].call(peer.leave, ids[A])
    del ids[A]
    again = {}
    for number in order:
        if number in ids:
            pair[number].call(peer.leave, ids[number])
        again[number] = pair[number].call(peer.join, PAIR, {A: 0, B: 1})
    for number, communicator in again.items():
        assert pair[number].call(peer.wait_for_status, communicator)[0] is OK


def test_a_running_transfer_keeps_the_communicator(members: Members) -> None:
    """Seen from both sides: the one that reads, and the one whose memory is read."""
    pair = {A: members("a"), B: members("b")}
    for number, process in pair.items():
        process.call(peer.open_peer, number, pool_bytes=peer.LONG_POOL_BYTES)
    pair[B].call(peer.offer_long)
    ids = joined(pair, PAIR)
    pulls = pair[A].start(peer.pull_until_told, B)

    def leave(number: int) -> Code:
        try:
            pair[number].call(peer.leave, ids[number])
        except LLMException as error:
            return error.status_code
        del ids[number]
        return Code.LLM_SUCCESS

    def join_again() -> None:
        for number in list(ids):
            pair[number].call(peer.leave, ids[number])
        ids.update(joined(pair, PAIR))

    for number in pair:
        peer.until_busy(lambda: leave(number), Code.LLM_LINK_BUSY, join_again)  # noqa: B023
        assert pair[number].call(peer.status, ids[number]) is OK
        assert [state for _, state, _ in pair[number].call(peer.member_links)] == [LINKED]
    pair[A].call(peer.stop_pulling)
    pulls.result()
    pair[B].call(peer.leave, ids[B])
    peer.wait_for_links(pair[A], [])


def test_leaving_while_preparing(processes: Processes) -> None:
    ranks = {A: 0, B: 1}
    lonely = processes[A].call(peer.join, PAIR, ranks)
    processes[A].call(peer.leave, lonely)
    assert code_of(processes[A].call, peer.leave, lonely) is Code.LLM_NOT_YET_LINK
    joined(pair_of(processes), PAIR)


def test_unknown_communicators(alone: Engine) -> None:
    assert code_of(alone.member_status, 99) is Code.LLM_NOT_YET_LINK
    assert code_of(alone.unlink_members, 99) is Code.LLM_NOT_YET_LINK


def test_finalize_while_preparing(alone: Engine) -> None:
    for number in range(20):
        alone.link_members(own(f"communicator {number}"), {A: 0, B: 1}, rank_table(2))
    started = time.monotonic()
    alone.close()
    assert time.monotonic() - started < 1
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("llm_datadist")] == []


# ---- refusals


def refused(engine: Engine, text: str, *args: object) -> None:
    with pytest.raises(LLMException, match=text) as caught:
        engine.link_members(*args)  # type: ignore[arg-type]
    assert caught.value.status_code is Code.LLM_PARAM_INVALID


def test_calls_that_are_refused_at_once(alone: Engine) -> None:
    refused(alone, "own cluster 11 must be among them", own("name"), {B: 0, C: 1}, rank_table(2))
    refused(alone, "rank_table is no JSON", own("name"), {A: 0, B: 1}, "{")
    refused(alone, "version is '9'", own("name"), {A: 0, B: 1}, rank_table(2, version="9"))
    refused(alone, "cluster 12 has rank 2, rank_table has ranks 0 to 1", own("name"), {A: 0, B: 2}, rank_table(2))
    refused(alone, "must be different", own("name"), {A: 0, B: 0}, rank_table(2))
    assert not alone.has_members
    assert alone.link_members(own("name"), {A: 0, B: 1}, rank_table(2)) == 1
    assert alone.has_members
    refused(alone, "a communicator 'name .*' exists", own("name"), {A: 0, C: 1}, rank_table(2))
    alone.unlink_members(1)
    assert alone.link_members(own("name"), {A: 0, B: 1}, rank_table(2)) == 2, "ids are not used again"


def test_not_with_a_transfer_backend() -> None:
    with contextlib.closing(make_engine(A, has_backend=True)) as engine:
        assert code_of(engine.link_members, own("name"), {A: 0, B: 1}, rank_table(2)) is Code.LLM_FEATURE_NOT_ENABLED


def test_as_many_communicators_as_there_may_be(alone: Engine) -> None:
    """All of them wait for a member that never comes, at hardly any cost."""
    allow_many_descriptors()
    for number in range(MAX_COMMUNICATORS):
        alone.link_members(own(f"communicator {number}"), {A: 1, B: 0}, rank_table(2))
    refused(alone, "512 communicators exist", own("one more"), {A: 0, B: 1}, rank_table(2))
    started, used = time.monotonic(), time.process_time()
    with contextlib.closing(make_engine(B)) as other:
        last = other.link_members(own("communicator 500"), {A: 1, B: 0}, rank_table(2))
        state = {"engine": other}
        assert peer.wait_for_status(state, last)[0] is OK
    print(f"{time.process_time() - used:.3f} s of processor time in {time.monotonic() - started:.3f} s")


# ---- members that do not agree, and time


def test_different_rank_tables_fail_on_both_sides(
    caplog: pytest.LogCaptureFixture, processes: Processes, alone: Engine
) -> None:
    ranks = {A: 0, B: 1}
    mine = alone.link_members(PAIR, ranks, rank_table(ranks))
    theirs = processes[B].call(peer.join, PAIR, ranks, rank_table({**ranks, C: 2}))
    found, seconds = processes[B].call(peer.wait_for_status, theirs)
    assert found is FAILED
    assert seconds < 2, "long before the deadline"
    assert peer.wait_for_status({"engine": alone}, mine)[0] is FAILED
    assert "ranks 0 and 1 were given different rank tables" in caplog.text
    processes[B].call(peer.leave, theirs)
    alone.unlink_members(mine)
    again = alone.link_members(PAIR, ranks, rank_table(ranks))
    processes[B].call(peer.join, PAIR, ranks)
    assert peer.wait_for_status({"engine": alone}, again)[0] is OK


def test_a_member_that_never_comes(caplog: pytest.LogCaptureFixture) -> None:
    with contextlib.closing(make_engine(A, link_total_time_s=1)) as engine:
        communicator = engine.link_members(PAIR, {A: 1, B: 0}, rank_table(2))
        found, seconds = peer.wait_for_status({"engine": engine}, communicator)
        assert found is FAILED
        assert 0.9 < seconds < 3
        assert "there is no link to cluster 12 (rank 0)" in caplog.text
        assert engine.member_status(communicator) == 2, "and it stays failed"


def test_the_time_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, alone: Engine) -> None:
    monkeypatch.setenv("HCCL_CONNECT_TIMEOUT", "1")
    communicator = alone.link_members(PAIR, {A: 0, B: 1}, rank_table(2))
    found, seconds = peer.wait_for_status({"engine": alone}, communicator)
    assert found is FAILED
    assert 0.9 < seconds < 3


def test_one_member_of_three_never_comes(members: Members) -> None:
    ranks = {A: 0, B: 1, C: 2}
    pair = {A: members("a"), C: members("c")}
    for number, process in pair.items():
        process.call(peer.open_peer, number, link_total_time_s=1 if number == C else 20)
    ids = {number: process.call(peer.join, own("three"), ranks) for number, process in pair.items()}
    for number, process in pair.items():
        assert process.call(peer.wait_for_status, ids[number], 5)[0] is FAILED, "one member's deadline ends it for all"
        assert process.call(peer.member_links) == []
