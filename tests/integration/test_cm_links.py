"""One-sided links of processes in cache-manager mode: any role, both directions, several at once."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from llm_datadist import LLMException, LLMRole, LLMStatusCode
from llm_datadist.engine.engine import Engine
from llm_datadist.engine.link import ClusterAddress
from llm_datadist.engine.options import EngineOptions
from tests import peer_engine as peer
from tests.many_engines import HOST, POOL_BYTES, address_of
from tests.peer_engine import BROKEN, LINKED, assert_pulls, make_engine, wait_for_links
from tests.processes import Member

Members = Callable[[str], Member]
FreePort = Callable[[], int]
Code = LLMStatusCode

OK = Code.LLM_SUCCESS
GOOD = (OK, [OK])
A, B, C = 1, 2, 3  # cluster ids


def answer(code: Code) -> tuple[Code, list[Code]]:
    return code, [code]


@pytest.fixture
def both(members: Members, free_port: FreePort) -> tuple[Member, Member, int, int]:
    """Two processes that listen, not linked."""
    ports = free_port(), free_port()
    a, b = members("a"), members("b")
    a.call(peer.open_peer, A, ports[0], LLMRole.DECODER)
    b.call(peer.open_peer, B, ports[1], LLMRole.PROMPT)
    return a, b, *ports


Both = tuple[Member, Member, int, int]


# ---- who links to whom


@pytest.mark.parametrize("role", [LLMRole.PROMPT, LLMRole.DECODER, LLMRole.MIX])
def test_any_role_links_and_pulls_in_both_directions(role: LLMRole, members: Members, free_port: FreePort) -> None:
    port, client, server = free_port(), members("client"), members("server")
    client.call(peer.open_peer, A, None, role)
    server.call(peer.open_peer, B, port, role)
    assert client.call(peer.link, (B, port)) == GOOD
    assert client.call(peer.links) == [(B, LINKED)]
    assert server.call(peer.links) == [(A, LINKED)]
    assert_pulls(client, server, B, 1)
    assert_pulls(server, client, A, 2)


def test_local_addresses_are_not_needed(both: Both) -> None:
    a, _, _, port = both

    assert a.call(link_without_local_address, B, port) == GOOD


def link_without_local_address(state: peer.State, cluster_id: int, port: int) -> Any:
    return state["engine"].link([ClusterAddress(cluster_id, (), address_of(cluster_id, port).remote)], 5000)


def test_a_linked_cluster_is_linked_already_from_both_sides(both: Both) -> None:
    a, b, a_port, b_port = both
    assert a.call(peer.link, (B, b_port)) == GOOD
    assert a.call(peer.link, (B, b_port)) == answer(Code.LLM_ALREADY_LINK)
    assert b.call(peer.link, (A, a_port)) == answer(Code.LLM_ALREADY_LINK)
    assert a.call(peer.links) == [(B, LINKED)]


# ---- answers


@pytest.fixture
def alone() -> Iterator[Engine]:
    with contextlib.closing(make_engine(A)) as engine:
        yield engine


def test_wrong_calls_are_answered_without_a_peer(alone: Engine, free_port: FreePort) -> None:
    assert alone.link([], 1000) == (Code.LLM_PARAM_INVALID, [])
    assert alone.unlink([], 1000, False) == (Code.LLM_PARAM_INVALID, [])
    many = [address_of(number, 1) for number in range(10, 27)]
    assert alone.link(many, 1000) == (Code.LLM_CLUSTER_NUM_EXCEED_LIMIT, [])
    assert alone.unlink(many, 1000, False) == (Code.LLM_CLUSTER_NUM_EXCEED_LIMIT, [])
    remote = address_of(B, free_port()).remote
    assert alone.link([ClusterAddress(B, (), remote * 2)], 1000) == answer(Code.LLM_PARAM_INVALID)
    assert alone.link([ClusterAddress(B, remote, ())], 1000) == answer(Code.LLM_PARAM_INVALID)
    assert alone.link([ClusterAddress(A, (), remote)], 1000) == answer(Code.LLM_PARAM_INVALID), "its own id"


def test_the_overall_answer_is_the_last_failure(both: Both, alone: Engine, free_port: FreePort) -> None:
    _, _, _, port = both
    nobody, good = address_of(8, free_port()), address_of(B, port)
    invalid = ClusterAddress(9, (), ())
    alone_result = alone.link([nobody, good, invalid, nobody], 5000)
    codes = [Code.LLM_LINK_FAILED, OK, Code.LLM_PARAM_INVALID, Code.LLM_REPEAT_REQUEST]
    assert alone_result == (Code.LLM_REPEAT_REQUEST, codes)
    assert alone.link([nobody, good], 5000) == (
        Code.LLM_ALREADY_LINK,
        [Code.LLM_LINK_FAILED, Code.LLM_ALREADY_LINK],
    )
    assert alone.unlink([nobody, good], 5000, False) == (OK, [OK, OK])


def test_nobody_listens(alone: Engine, free_port: FreePort) -> None:
    started = time.monotonic()
    assert alone.link([address_of(B, free_port())], 20_000) == answer(Code.LLM_LINK_FAILED)
    assert time.monotonic() - started < 5, "a refused connection is known at once"
    assert alone.unlink([address_of(B, 1)], 1000, False) == GOOD
    alone.switch_role(LLMRole.PROMPT, None)  # nothing is left of the try


def test_a_listener_that_never_answers(alone: Engine) -> None:
    with socket.create_server((HOST, 0)) as silent:
        started = time.monotonic()
        assert alone.link([address_of(B, silent.getsockname()[1])], 300) == answer(Code.LLM_TIMEOUT)
        assert 0.3 <= time.monotonic() - started < 2


def test_the_total_time_bounds_a_call() -> None:
    with contextlib.closing(make_engine(A, link_total_time_s=1)) as engine, socket.create_server((HOST, 0)) as silent:
        started = time.monotonic()
        assert engine.link([address_of(B, silent.getsockname()[1])], 60_000) == answer(Code.LLM_TIMEOUT)
        assert 1 <= time.monotonic() - started < 4


def test_attempts_share_the_time(members: Members, free_port: FreePort) -> None:
    """Nobody listens at the first attempt; at a later one somebody does."""
    client, server, port = members("client"), members("server"), free_port()
    client.call(peer.open_peer, A, None, link_retry_count=40)
    call = client.start(peer.link, (B, port), timeout_ms=20_000)
    server.call(peer.open_peer, B, port)
    assert call.result() == GOOD


def test_attempts_end_with_the_time(free_port: FreePort) -> None:
    with contextlib.closing(make_engine(A, link_retry_count=3)) as engine:
        started = time.monotonic()
        assert engine.link([address_of(B, free_port())], 600) == answer(Code.LLM_LINK_FAILED)
        assert 0.4 <= time.monotonic() - started < 3


def test_the_two_modes_do_not_link(alone: Engine, free_port: FreePort, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("WARNING", "llm_datadist")
    ports = free_port(), free_port()
    options = EngineOptions(LLMRole.PROMPT, B, listen=((HOST, ports[0]),), pool_bytes=POOL_BYTES)
    with contextlib.closing(Engine(options)):
        assert alone.link([address_of(B, ports[0])], 5000) == answer(Code.LLM_LINK_FAILED)
    assert "the client is in cache-manager mode: set llm.EnableCacheManager alike" in caplog.text
    caplog.clear()
    decoder = Engine(EngineOptions(LLMRole.DECODER, B, pool_bytes=POOL_BYTES))
    with contextlib.closing(decoder), contextlib.closing(make_engine(C, ports[1])):
        assert decoder.link([address_of(C, ports[1])], 5000) == answer(Code.LLM_LINK_FAILED)
    assert "this process is in cache-manager mode, the client is not" in caplog.text


# ---- several threads


def test_threads_link_to_different_clusters_at_the_same_time(members: Members, free_port: FreePort) -> None:
    client = members("client")
    client.call(peer.open_peer, A)
    targets = [(10 + number, free_port()) for number in range(6)]
    for target in targets:
        members(f"server-{target[0]}").call(peer.open_peer, *target)
    assert client.call(peer.link_from_threads, *targets) == [GOOD] * 6
    assert client.call(peer.links) == [(number, LINKED) for number, _ in targets]


def test_threads_link_to_the_same_cluster(both: Both) -> None:
    a, b, _, port = both
    for _ in range(10):
        results = a.call(peer.link_from_threads, *[(B, port)] * 4)
        assert results.count(GOOD) == 1
        others = {result[0] for result in results if result != GOOD}
        assert others <= {Code.LLM_PROCESSING_LINK, Code.LLM_ALREADY_LINK}
        assert a.call(peer.unlink, (B, port)) == GOOD
        assert b.call(peer.links) == []


def test_an_unlink_during_the_link_is_told_to_wait(alone: Engine) -> None:
    with socket.create_server((HOST, 0)) as silent:
        cluster = address_of(B, silent.getsockname()[1])
        thread = threading.Thread(target=alone.link, args=([cluster], 1000))
        thread.start()
        silent.accept()[0].close()  # the call is on its way
        assert alone.unlink([cluster], 1000, False) == answer(Code.LLM_PROCESSING_LINK)
        with pytest.raises(LLMException) as caught:
            alone.switch_role(LLMRole.MIX, None)
        assert caught.value.status_code is Code.LLM_EXIST_LINK
        thread.join(10)
    assert alone.unlink([cluster], 1000, False) == GOOD


def test_two_processes_link_each_other_at_the_same_moment(both: Both) -> None:
    a, b, a_port, b_port = both
    crossed = 0
    for number in range(60):
        calls = [a.start(peer.link, (B, b_port)), b.start(peer.link, (A, a_port))]
        results = [call.result() for call in calls]
        assert all(result in (GOOD, answer(Code.LLM_ALREADY_LINK)) for result in results)
        crossed += results == [GOOD, GOOD]
        assert a.call(peer.links) == [(B, LINKED)]
        assert b.call(peer.links) == [(A, LINKED)]
        if number % 10 == 0:
            assert_pulls(a, b, B, number + 1)
            assert_pulls(b, a, A, number + 1)
        side = (a.call, (B, b_port)) if number % 2 else (b.call, (A, a_port))
        assert side[0](peer.unlink, side[1]) == GOOD
    print(f"{crossed} of 60 pairs of calls crossed")
    assert crossed, "the calls never met"


def test_three_processes_link_each_other_at_the_same_moment(members: Members, free_port: FreePort) -> None:
    ports = {number: free_port() for number in (A, B, C)}
    processes = {number: members(f"member-{number}") for number in ports}
    for number, process in processes.items():
        process.call(peer.open_peer, number, ports[number])
    for _ in range(10):
        calls = [
            process.start(peer.link, *[target for target in ports.items() if target[0] != number])
            for number, process in processes.items()
        ]
        for call in calls:
            assert set(call.result()[1]) <= {OK, Code.LLM_ALREADY_LINK}
        for number, process in processes.items():
            assert process.call(peer.links) == [(other, LINKED) for other in ports if other != number]
        for number, process in processes.items():
            process.call(peer.unlink, *[target for target in ports.items() if target[0] != number])
            assert process.call(peer.links) == []


# ---- unlink


@pytest.mark.parametrize("opener_unlinks", [True, False])
def test_either_side_unlinks_both(both: Both, opener_unlinks: bool) -> None:
    a, b, a_port, b_port = both
    for _ in range(3):
        assert a.call(peer.link, (B, b_port)) == GOOD
        if opener_unlinks:
            assert a.call(peer.unlink, (B, b_port)) == GOOD
        else:
            assert b.call(peer.unlink, (A, a_port)) == GOOD
        assert a.call(peer.links) == []
        assert b.call(peer.links) == []


def test_the_side_that_does_not_listen_is_unlinked_too(members: Members, free_port: FreePort) -> None:
    client, server, port = members("client"), members("server"), free_port()
    client.call(peer.open_peer, A)
    server.call(peer.open_peer, B, port)
    assert client.call(peer.link, (B, port)) == GOOD
    assert server.call(peer.unlink, (A, 1)) == GOOD
    assert client.call(peer.links) == []
    assert client.call(peer.unlink, (B, port)) == GOOD
    assert client.call(peer.link, (B, port)) == GOOD


def test_both_sides_unlink_at_the_same_moment(both: Both) -> None:
    a, b, a_port, b_port = both
    for _ in range(30):
        assert a.call(peer.link, (B, b_port)) == GOOD
        calls = [a.start(peer.unlink, (B, b_port)), b.start(peer.unlink, (A, a_port))]
        assert [call.result() for call in calls] == [GOOD, GOOD]
        assert a.call(peer.links) == b.call(peer.links) == []


def test_a_running_transfer_keeps_the_link(members: Members, free_port: FreePort) -> None:
    """Seen from both sides: the one that reads, and the one whose memory is read."""
    a, b, port = members("a"), members("b"), free_port()
    a.call(peer.open_peer, A, pool_bytes=peer.LONG_POOL_BYTES)
    b.call(peer.open_peer, B, port, pool_bytes=peer.LONG_POOL_BYTES)
    b.call(peer.offer_long)
    assert a.call(peer.link, (B, port)) == GOOD
    pulls = a.start(peer.pull_until_told, B)
    for process, target in ((a, (B, port)), (b, (A, 1))):
        for force in (False, True):
            peer.until_busy(
                lambda: process.call(peer.unlink, target, force=force),  # noqa: B023
                answer(Code.LLM_LINK_BUSY),
                lambda: a.call(peer.link, (B, port)),
            )
            assert a.call(peer.links) == [(B, LINKED)]
            assert b.call(peer.links) == [(A, LINKED)]
    a.call(peer.stop_pulling)
    pulls.result()
    assert b.call(peer.unlink, (A, 1)) == GOOD
    assert a.call(peer.links) == []


@pytest.mark.parametrize("opener_forces", [True, False])
def test_a_forced_unlink_cleans_one_side_and_linking_again_replaces_the_rest(both: Both, opener_forces: bool) -> None:
    a, b, a_port, b_port = both
    assert a.call(peer.link, (B, b_port)) == GOOD
    one, other, target = (a, b, (B, b_port)) if opener_forces else (b, a, (A, a_port))
    back = (A, a_port) if opener_forces else (B, b_port)
    assert one.call(peer.unlink, target, force=True) == GOOD
    assert one.call(peer.links) == []
    assert one.call(peer.link, target) == GOOD, "the side that forced links again"
    assert other.call(peer.links) == [(back[0], LINKED)]
    assert one.call(peer.unlink, target, force=True) == GOOD
    wait_for_links(other, [(back[0], BROKEN)])
    assert other.call(peer.link, back) == GOOD, "the side that is left with a broken link links again"
    assert one.call(peer.links) == [(target[0], LINKED)]
    assert_pulls(a, b, B, 1)


def test_the_side_left_behind_by_a_forced_unlink_unlinks(both: Both) -> None:
    a, b, a_port, b_port = both
    assert a.call(peer.link, (B, b_port)) == GOOD
    a.call(peer.unlink, (B, b_port), force=True)
    wait_for_links(b, [(A, BROKEN)])
    assert b.call(peer.unlink, (A, a_port)) == answer(Code.LLM_UNLINK_FAILED)
    assert b.call(peer.links) == []
    assert b.call(peer.unlink, (A, a_port)) == GOOD


# ---- switch_role


def code_of(member: Member, *args: Any) -> Code:
    with pytest.raises(LLMException) as caught:
        member.call(*args)
    return caught.value.status_code


def test_switch_role_moves_the_listening_address(both: Both, free_port: FreePort) -> None:
    a, b, _, b_port = both
    new_port = free_port()
    b.call(peer.switch, LLMRole.PROMPT, new_port)
    assert a.call(peer.link, (B, b_port)) == answer(Code.LLM_LINK_FAILED)
    assert a.call(peer.link, (B, new_port)) == GOOD
    assert code_of(b, peer.switch, LLMRole.DECODER, new_port) is Code.LLM_EXIST_LINK
    assert code_of(a, peer.switch, LLMRole.DECODER, None) is Code.LLM_EXIST_LINK
    assert a.call(peer.unlink, (B, new_port)) == GOOD
    b.call(peer.switch, LLMRole.DECODER, new_port)
    assert b.call(peer.role_of) is LLMRole.DECODER
    assert a.call(peer.link, (B, new_port)) == GOOD
    assert a.call(peer.unlink, (B, new_port)) == GOOD
    b.call(peer.switch, LLMRole.DECODER, None)
    assert a.call(peer.link, (B, new_port)) == answer(Code.LLM_LINK_FAILED)
    b.call(peer.switch, LLMRole.MIX, None)
    b.call(peer.switch, LLMRole.MIX, b_port)
    assert a.call(peer.link, (B, b_port)) == GOOD


def test_an_address_that_is_taken_changes_nothing(both: Both) -> None:
    a, b, a_port, b_port = both
    assert code_of(b, peer.switch, LLMRole.MIX, a_port) is Code.LLM_FAILED
    assert b.call(peer.role_of) is LLMRole.PROMPT
    assert a.call(peer.link, (B, b_port)) == GOOD


def test_switches_right_after_the_start(free_port: FreePort) -> None:
    """Addresses change before the control thread has come to the first one."""
    ports = [free_port() for _ in range(4)]
    for _ in range(10):
        with contextlib.closing(make_engine(B, ports[0])) as engine:
            for port in ports[1:]:
                engine.switch_role(LLMRole.MIX, (HOST, port))


def test_a_transfer_backend_pins_the_address(free_port: FreePort) -> None:
    port = free_port()
    with contextlib.closing(make_engine(B, port, has_backend=True)) as engine:
        engine.switch_role(LLMRole.DECODER, (HOST, port))
        for address in (None, (HOST, free_port())):
            with pytest.raises(LLMException) as caught:
                engine.switch_role(LLMRole.MIX, address)
            assert caught.value.status_code is Code.LLM_FEATURE_NOT_ENABLED
        assert engine.role is LLMRole.DECODER
