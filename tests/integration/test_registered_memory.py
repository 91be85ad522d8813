"""Caches that are memory of their program: reached through the kernel, or mapped when they lie in the pool."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from llm_datadist import LLMStatusCode
from llm_datadist.engine.keys import KeyKind, KeyName
from llm_datadist.transports import private_memory
from tests import registering_engines as reg
from tests.datadist_member import payload
from tests.processes import Member

OK = LLMStatusCode.LLM_SUCCESS
INVALID = LLMStatusCode.LLM_PARAM_INVALID
NOT_EXIST = LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
TIMEOUT = LLMStatusCode.LLM_TIMEOUT
ONE, TWO = 1, 2  # cluster ids
SHAPE = (8, 4096)  # blocks of a page
BLOCKS: KeyName = (int(KeyKind.BLOCKS), 0, 0)
KEY: KeyName = (int(KeyKind.ORDINARY), 7, 0)
POOL = {"device_pool_bytes": 1 << 20}


def by_id(cache_id: int, slot: int = 0) -> KeyName:
    return (int(KeyKind.CACHE), cache_id, slot)


def block(seed: int, tensor: int, index: int, shape: tuple[int, int] = SHAPE) -> bytes:
    nbytes = shape[1]
    return payload(seed, tensor, shape[0] * nbytes)[index * nbytes : (index + 1) * nbytes].tobytes()


class Two(NamedTuple):
    """The owner of caches, and a process that has linked to it."""

    owner: Member
    peer: Member

    def blocks_at_peer(self, cache_id: int, tensor: int) -> list[bytes]:
        data = self.peer.call(reg.read, cache_id, tensor)
        return [data[at : at + SHAPE[1]] for at in range(0, len(data), SHAPE[1])]


@pytest.fixture(params=[private_memory.PROCESS_VM, private_memory.DATA_SERVER])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How private memory is reached; the processes of a test inherit it."""
    monkeypatch.setenv(private_memory.VARIABLE, request.param)
    return str(request.param)


@pytest.fixture
def two(
    way: str, members: Callable[[str], Member], free_port: Callable[[], int], request: pytest.FixtureRequest
) -> Two:
    options: dict[str, Any] = getattr(request, "param", {})
    owner, peer, port = members("owner"), members("peer"), free_port()
    owner.call(reg.open_engine, ONE, port, **{**POOL, **options})
    peer.call(reg.open_engine, TWO, **{**POOL, **options})
    assert peer.call(reg.link, ONE, port) == (OK, [OK])
    return Two(owner, peer)


# ---- pulls


@pytest.mark.parametrize("local_in_pool", [False, True])
@pytest.mark.parametrize("in_pool", [False, True])
def test_blocks_of_registered_memory(two: Two, in_pool: bool, local_in_pool: bool) -> None:
    two.owner.call(reg.register, 3, SHAPE, 1, (), 0, in_pool)
    mine = two.peer.call(reg.register, 3, SHAPE, 0, (), None, local_in_pool)
    for _ in range(2):  # a pull of blocks releases nothing
        assert two.peer.call(reg.outcome, "pull_blocks", ONE, BLOCKS, mine, [3, 0, 7], [1, 2, 6], None, None) is OK
    for tensor in range(3):
        got = two.blocks_at_peer(mine, tensor)
        assert [got[1], got[2], got[6]] == [block(1, tensor, index) for index in (3, 0, 7)]
        assert not any(map(any, (got[0], got[3], got[4], got[5], got[7])))


def test_tensors_that_are_registered_after_linking_are_seen(two: Two) -> None:
    mine = two.peer.call(reg.register, 1, SHAPE)
    pull = ("pull_blocks", ONE, BLOCKS, mine, [0], [0], None, None)
    assert two.peer.call(reg.outcome, *pull) is NOT_EXIST
    theirs = two.owner.call(reg.register, 1, SHAPE, 1, (), 0)
    assert two.peer.call(reg.outcome, *pull) is OK
    two.owner.call(reg.unregister, theirs)
    assert two.peer.call(reg.outcome, *pull) is NOT_EXIST


def test_a_pull_by_key_does_not_release_it(two: Two) -> None:
    theirs = two.owner.call(reg.register, 2, SHAPE, 5, [None, KEY])
    mine = two.peer.call(reg.register, 2, SHAPE)
    pull = ("pull_cache", ONE, KEY, mine, 2, -1, None, None, 0, 0, True)
    for _ in range(3):
        assert two.peer.call(reg.outcome, *pull) is OK
    assert two.blocks_at_peer(mine, 1)[2] == block(5, 1, 1)
    pull = ("pull_cache", ONE, by_id(theirs, 4), mine, 3, -1, None, None, 0, 0, True)
    assert two.peer.call(reg.outcome, *pull) is OK
    assert two.blocks_at_peer(mine, 0)[3] == block(5, 0, 4)
    assert two.peer.call(reg.outcome, "pull_cache", ONE, KEY, mine, 0, -1, None, None, 0, 0, True) is OK


def test_layers_of_registered_memory(two: Two) -> None:
    two.owner.call(reg.register, 4, SHAPE, 1, (), 0)
    mine = two.peer.call(reg.register, 4, SHAPE)
    assert two.peer.call(reg.outcome, "pull_blocks", ONE, BLOCKS, mine, [5], [5], (2, 1), (0, 1)) is OK
    assert two.blocks_at_peer(mine, 0)[5] == block(1, 2, 5)
    assert not any(two.peer.call(reg.read, mine, 2))


@pytest.mark.parametrize("in_pool", [False, True])
def test_a_slot_is_cut_into_blocks(two: Two, in_pool: bool) -> None:
    wide = (2, 3 * SHAPE[1])
    theirs = two.owner.call(reg.register, 2, wide, 9, [None, KEY], None, in_pool)
    mine = two.peer.call(reg.register, 2, SHAPE)
    for key, slot in ((KEY, 1), (by_id(theirs, 0), 0)):
        assert two.peer.call(reg.outcome, "pull_blocks", ONE, key, mine, None, [6, 1, 3], None, None) is OK
        for tensor in range(2):
            whole = block(9, tensor, slot, wide)
            got = two.blocks_at_peer(mine, tensor)
            assert got[6] + got[1] + got[3] == whole
    too_many = ("pull_blocks", ONE, KEY, mine, None, [0, 1, 2, 3], None, None)
    assert two.peer.call(reg.outcome, *too_many) is INVALID


def test_the_key_of_an_allocated_cache_goes_when_it_is_cut_into_blocks(two: Two) -> None:
    two.owner.call(reg.do, "allocate", 2, 2 * SHAPE[1], 1, [KEY])
    mine = two.peer.call(reg.register, 2, SHAPE)
    pull = ("pull_blocks", ONE, KEY, mine, None, [0, 1], None, None)
    assert two.peer.call(reg.outcome, *pull) is OK
    assert two.peer.call(reg.outcome, *pull) is NOT_EXIST


@pytest.mark.parametrize("two", [{"remote_access": True}], indirect=True)
def test_what_is_not_accessible_is_not_found(two: Two) -> None:
    hidden = two.owner.call(reg.register, 1, SHAPE, 1, (), 0, False, False)
    shown = two.owner.call(reg.register, 1, SHAPE, 2, (), 1)
    mine = two.peer.call(reg.register, 1, SHAPE)
    pull = ("pull_cache", ONE, by_id(hidden), mine, 0, -1, None, None, 0, 0, True)
    assert two.peer.call(reg.outcome, *pull) is NOT_EXIST
    assert two.peer.call(reg.outcome, "pull_blocks", ONE, BLOCKS, mine, [0], [0], None, None) is NOT_EXIST
    assert two.owner.call(reg.outcome, "push_blocks", TWO, BLOCKS, shown, [0], [0], None, None) is NOT_EXIST
    pull = ("pull_cache", ONE, by_id(shown), mine, 0, -1, None, None, 0, 0, True)
    assert two.peer.call(reg.outcome, *pull) is OK
    at = two.owner.call(reg.addresses, hidden)
    push = ("push_layer", ONE, mine, (0, 1), at, 0, None, None, 0)
    assert two.peer.call(reg.outcome, *push) is INVALID


# ---- pushes, in both directions of the link


@pytest.mark.parametrize("in_pool", [False, True])
@pytest.mark.parametrize("backwards", [False, True])
def test_pushes_to_keys(two: Two, backwards: bool, in_pool: bool) -> None:
    source, target, cluster = (two.peer, two.owner, ONE) if backwards else (two.owner, two.peer, TWO)
    mine = source.call(reg.register, 4, SHAPE, 3)
    theirs = target.call(reg.register, 4, SHAPE, 0, (), 0, in_pool)
    assert source.call(reg.outcome, "push_blocks", cluster, BLOCKS, mine, [0, 1], [7, 2], None, None) is OK
    assert source.call(reg.outcome, "push_cache", cluster, by_id(theirs, 4), mine, 5, (0, 2), (2, 2)) is OK
    for tensor in range(4):
        data = target.call(reg.read, theirs, tensor)
        got = [data[at : at + SHAPE[1]] for at in range(0, len(data), SHAPE[1])]
        assert (got[7], got[2]) == (block(3, tensor, 0), block(3, tensor, 1))
        assert got[4] == (block(3, tensor - 2, 5) if tensor >= 2 else bytes(SHAPE[1]))
        assert not any(map(any, (got[0], got[1], got[3], got[5], got[6])))


@pytest.mark.parametrize("in_pool", [False, True])
def test_pushes_to_addresses(two: Two, in_pool: bool) -> None:
    mine = two.owner.call(reg.register, 2, SHAPE, 3)
    theirs = two.peer.call(reg.register, 2, SHAPE, 0, (), None, in_pool)
    at = two.peer.call(reg.addresses, theirs)
    second = [address + SHAPE[1] for address in at]
    assert two.owner.call(reg.outcome, "push_layer", TWO, mine, (0, 2), second, 6, None, None, 0) is OK
    assert two.owner.call(reg.outcome, "push_layer", TWO, mine, (0, 2), at, None, [1, 2], [4, 5], 0) is OK
    # A slot in halves of a page: half 0 to half 14, half 1 to half 13.
    half = SHAPE[1] // 2
    assert two.owner.call(reg.outcome, "push_layer", TWO, mine, (0, 2), at, 0, None, [14, 13], half) is OK
    for tensor in range(2):
        got = two.blocks_at_peer(theirs, tensor)
        assert (got[1], got[4], got[5]) == tuple(block(3, tensor, index) for index in (6, 1, 2))
        assert (got[7][:half], got[6][half:]) == (block(3, tensor, 0)[:half], block(3, tensor, 0)[half:])
        assert not any(map(any, (got[0], got[2], got[3], got[6][:half], got[7][half:])))


def test_pushes_that_do_not_fit(two: Two) -> None:
    mine = two.owner.call(reg.register, 2, SHAPE, 3)
    theirs = two.peer.call(reg.register, 2, SHAPE, 0, (), 0)
    small = two.peer.call(reg.register, 2, (8, 512), 0, (), 1)
    at = two.peer.call(reg.addresses, theirs)
    last = SHAPE[0] * SHAPE[1]
    wrong: list[tuple[Any, ...]] = [
        ("push_blocks", TWO, BLOCKS, mine, [0], [SHAPE[0]], None, None),
        ("push_blocks", TWO, BLOCKS, mine, [SHAPE[0]], [0], None, None),
        ("push_blocks", TWO, (int(KeyKind.BLOCKS), 0, 1), mine, [0], [0], None, None),
        ("push_cache", TWO, by_id(small), mine, 0, None, None),
        ("push_cache", TWO, by_id(theirs, SHAPE[0]), mine, 0, None, None),
        ("push_cache", TWO, by_id(theirs), mine, SHAPE[0], None, None),
        ("push_cache", TWO, by_id(theirs), mine, 0, (0, 2), (1, 2)),
        ("push_layer", TWO, mine, (0, 2), [at[0], at[1] + last - SHAPE[1] + 1], 0, None, None, 0),
        ("push_layer", TWO, mine, (0, 2), [at[0] - 1, at[1]], 0, None, None, 0),
        ("push_layer", TWO, mine, (0, 2), [4096, at[1]], 0, None, None, 0),
        ("push_layer", TWO, mine, (0, 2), at, None, [0], [SHAPE[0]], 0),
    ]
    for call in wrong:
        assert two.owner.call(reg.outcome, *call) is INVALID, call
    assert two.owner.call(reg.outcome, "push_cache", TWO, by_id(99), mine, 0, None, None) is NOT_EXIST
    assert not any(any(two.peer.call(reg.read, cache, tensor)) for cache in (theirs, small) for tensor in range(2))


# ---- life of the memory


@pytest.mark.parametrize("way", [private_memory.PROCESS_VM], indirect=True)
def test_a_stopped_owner_is_pulled_from_and_pushed_to(two: Two, way: str) -> None:
    theirs = two.owner.call(reg.register, 2, SHAPE, 1, (), 0)
    mine = two.peer.call(reg.register, 2, SHAPE)
    two.owner.stop()
    assert two.peer.call(reg.outcome, "pull_blocks", ONE, BLOCKS, mine, [1], [0], None, None) is OK
    assert two.peer.call(reg.outcome, "push_blocks", ONE, BLOCKS, mine, [0], [5], None, None) is OK
    two.owner.cont()
    data = two.owner.call(reg.read, theirs, 1)
    assert data[5 * SHAPE[1] : 6 * SHAPE[1]] == block(1, 1, 1)


def pull_until_it_fails(state: reg.State, cache_id: int, blocks: list[int]) -> LLMStatusCode:
    while True:
        code = reg.outcome(state, "pull_blocks", ONE, BLOCKS, cache_id, blocks, blocks, None, None)
        if code is not OK:
            return code
        state["pulls"] = state.get("pulls", 0) + 1


def pulls_so_far(state: reg.State) -> int:
    return int(state.get("pulls", 0))


def start_large_pulls(two: Two) -> tuple[Any, int]:
    shape = (64, 1 << 17)
    theirs = two.owner.call(reg.register, 4, shape, 1, (), 0)
    mine = two.peer.call(reg.register, 4, shape)
    call = two.peer.start(pull_until_it_fails, mine, list(range(64)))
    deadline = time.monotonic() + 20
    while two.peer.call(pulls_so_far) < 2:
        assert time.monotonic() < deadline
    return call, theirs


def test_an_owner_killed_in_a_pull(two: Two) -> None:
    call, _ = start_large_pulls(two)
    two.owner.kill()
    assert call.result() is TIMEOUT


def test_unregister_waits_for_pulls_and_ends_them(two: Two) -> None:
    call, theirs = start_large_pulls(two)
    two.owner.call(reg.unregister, theirs)
    assert call.result() is NOT_EXIST


def test_unregister_does_not_wait_for_ever_for_a_stopped_peer(
    way: str, members: Any, free_port: Callable[[], int]
) -> None:
    """A peer that is stopped in the middle of a transfer may write when it goes on: the memory is not given back."""
    owner, peer, port = members("owner"), members("peer"), free_port()
    owner.call(reg.open_engine, ONE, port, 300)
    peer.call(reg.open_engine, TWO)
    peer.call(reg.link, ONE, port)
    call, theirs = start_large_pulls(Two(owner, peer))
    peer.stop()
    started = time.monotonic()
    code = owner.call(reg.do, "unregister", theirs)
    assert time.monotonic() - started < 2
    assert code in (None, TIMEOUT)  # it may have been stopped between two pulls
    peer.cont()
    assert call.result() is NOT_EXIST
    owner.call(reg.unregister, theirs)


def test_memory_that_was_freed_without_a_word_is_an_error(two: Two) -> None:
    mapped = two.owner.call(reg.map_pages, 4)
    theirs = two.owner.call(reg.do, "register", 1, 4 * 4096, 4, [mapped], (), 0)
    mine = two.peer.call(reg.register, 1, (4, 4096))
    pull = ("pull_blocks", ONE, BLOCKS, mine, [0, 1, 2, 3], [0, 1, 2, 3], None, None)
    assert two.peer.call(reg.outcome, *pull) is OK
    two.owner.call(reg.unmap_pages)
    assert two.peer.call(reg.outcome, *pull) is LLMStatusCode.LLM_FAILED
    two.owner.call(reg.do, "unregister", theirs)
    assert two.peer.call(reg.outcome, *pull) is NOT_EXIST


def test_keys_are_free_again_after_unregister(two: Two) -> None:
    first = two.owner.call(reg.register, 1, SHAPE, 1, [KEY], 0)
    assert two.owner.call(reg.do, "register", 1, 8, 1, [4096], [KEY]) is INVALID
    assert two.owner.call(reg.do, "register", 1, 8, 1, [4096], (), 0) is INVALID
    two.owner.call(reg.unregister, first)
    assert two.owner.call(reg.register, 1, SHAPE, 1, [KEY], 0) > first
    assert two.owner.call(reg.do, "unregister", 99) is None


def test_registrations_that_cannot_be(two: Two) -> None:
    for arguments in (
        (2, 64, 1, [4096]),
        (1, 64, 1, [0]),
        (1, 64, 1, [-1]),
        (1, 64, 1, [2**64 - 1]),
        (1, 64, 1, [4096], [KEY, KEY]),
    ):
        assert two.owner.call(reg.do, "register", *arguments) is INVALID


# ---- pools of both placements


@pytest.mark.parametrize("two", [{"host_pool_bytes": 1 << 18, "host_page_bytes": 1 << 12}], indirect=True)
def test_two_pools(two: Two) -> None:
    device, (first,) = two.owner.call(reg.do, "allocate", 1, 1 << 19, 1)[0], (0,)
    assert device > first
    host = two.owner.call(reg.do, "allocate", 1, 1 << 17, 1, (), None, 0, True)[0]
    assert host == device + 1
    no_room = LLMStatusCode.LLM_OUT_OF_MEMORY
    assert two.owner.call(reg.do, "allocate", 1, 1 << 18, 1, (), None, 0, True) is no_room
    assert two.owner.call(reg.do, "allocate", 1, (1 << 19) + 1, 1) is no_room
    two.owner.call(reg.do, "deallocate", host)
    assert two.owner.call(reg.do, "allocate", 1, 1 << 18, 1, (), None, 0, True) is not no_room


# ---- the ways to private memory


def test_the_way_is_in_the_description_of_the_link(two: Two, way: str) -> None:
    for member in two:
        (link,) = member.call(reg.do, "describe_links")
        assert (link.transport, link.private_memory) == ("shared_memory", way)


@pytest.mark.parametrize("way", [private_memory.DATA_SERVER], indirect=True)
@pytest.mark.parametrize("call", ["pull_blocks", "push_blocks"])
def test_a_stopped_data_server_costs_no_more_than_the_timeout(
    way: str, members: Callable[[str], Member], free_port: Callable[[], int], call: str
) -> None:
    owner, peer, port = members("owner"), members("peer"), free_port()
    owner.call(reg.open_engine, ONE, port)
    peer.call(reg.open_engine, TWO, None, 300)
    assert peer.call(reg.link, ONE, port) == (OK, [OK])
    large = (64, 1 << 16)
    theirs = owner.call(reg.register, 2, large, 1, (), 0)
    mine = peer.call(reg.register, 2, large, 2)
    blocks = list(range(64))
    move = (call, ONE, BLOCKS, mine, blocks, blocks, None, None)
    assert peer.call(reg.outcome, *move) is OK
    for _ in range(3):
        owner.stop()
        started = time.monotonic()
        assert peer.call(reg.outcome, *move) is TIMEOUT
        assert time.monotonic() - started < 1.3
        owner.cont()
        assert peer.call(reg.outcome, *move) is OK  # the link is as good as before
    assert owner.call(reg.read, theirs, 1) == peer.call(reg.read, mine, 1)


@pytest.mark.parametrize("way", [private_memory.DATA_SERVER], indirect=True)
def test_several_transfers_over_the_data_server_at_the_same_time(two: Two, way: str) -> None:
    two.owner.call(reg.register, 3, SHAPE, 1, (), 0)
    targets = [two.peer.call(reg.register, 3, SHAPE) for _ in range(6)]
    calls = [
        two.peer.start(reg.outcome, "pull_blocks", ONE, BLOCKS, target, [0, 5], [1, 2], None, None)
        for target in targets
    ]
    assert [call.result() for call in calls] == [OK] * 6
    for target in targets:
        assert two.blocks_at_peer(target, 2)[1:3] == [block(1, 2, 0), block(1, 2, 5)]


def test_an_unknown_way_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(private_memory.VARIABLE, "telepathy")
    with pytest.raises(ValueError, match="is 'telepathy', should be 'process_vm' or 'data_server'"):
        private_memory.may_use_kernel()
