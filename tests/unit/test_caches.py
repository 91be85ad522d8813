"""The table of caches: holders, retired memory, destructors, exhaustion."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from llm_datadist._directory import Claims
from llm_datadist.devices.host import HostPool
from llm_datadist.engine.cache_pool import ALIGNMENT, CachePool
from llm_datadist.engine.caches import CacheTable
from llm_datadist.engine.keys import KeyKind, KeyName
from llm_datadist.status import LLMException, LLMStatusCode

POOL = 1 << 20


@pytest.fixture
def caches() -> Iterator[CacheTable]:
    table = CacheTable(HostPool(POOL), CachePool(POOL))
    yield table
    table.close()


SOON = 0.2  # seconds that an allocation may wait for retired memory


def key(number: int, kind: KeyKind = KeyKind.ORDINARY) -> KeyName:
    return int(kind), number, 0


def used(caches: CacheTable) -> int:
    return caches.statistics().used


def test_tensors_are_aligned_and_do_not_overlap(caches: CacheTable) -> None:
    cache_id, addresses = caches.allocate(3, 700, 7, {}, SOON)
    assert cache_id == 1
    assert [address % ALIGNMENT for address in addresses] == [0, 0, 0]
    assert [b - a for a, b in zip(addresses, addresses[1:])] == [1024, 1024]
    assert used(caches) == 3072


def test_ids_count_up_and_are_never_used_again(caches: CacheTable) -> None:
    for expected in (1, 2, 3):
        cache_id, _ = caches.allocate(1, 64, 1, {}, SOON)
        assert cache_id == expected
        assert caches.deallocate(cache_id)
        assert not caches.deallocate(cache_id)
    assert used(caches) == 0


def test_memory_is_held_by_the_id_and_by_every_key(caches: CacheTable) -> None:
    cache_id, _ = caches.allocate(1, 64, 2, {key(1): 0, key(2): 1}, SOON)
    caches.deallocate(cache_id)
    assert cache_id not in caches.by_id
    assert caches.remove_key(key(1))
    assert used(caches) > 0
    assert caches.remove_key(key(2))
    assert not caches.remove_key(key(2))
    assert used(caches) == 0


def test_a_blocks_key_goes_with_the_id(caches: CacheTable) -> None:
    cache_id, _ = caches.allocate(1, 64, 2, {key(0, KeyKind.BLOCKS): 0}, SOON)
    caches.deallocate(cache_id)
    assert used(caches) == 0
    caches.allocate(1, 64, 2, {key(0, KeyKind.BLOCKS): 0}, SOON)


def test_a_bound_key_fails_the_whole_allocation(caches: CacheTable) -> None:
    caches.allocate(1, 64, 1, {key(1): 0}, SOON)
    before = caches.statistics()
    with pytest.raises(LLMException, match="ordinary key 1 of model 0 is bound already") as caught:
        caches.allocate(1, 64, 2, {key(9): 0, key(1): 1}, SOON)
    assert caught.value.status_code is LLMStatusCode.LLM_PARAM_INVALID
    assert caches.statistics() == before
    caches.allocate(1, 64, 1, {key(9): 0}, SOON)


def test_exhaustion_says_what_was_wanted_and_what_is_there(caches: CacheTable) -> None:
    first, _ = caches.allocate(1, POOL // 2, 1, {}, SOON)
    caches.allocate(1, POOL // 4, 1, {}, SOON)
    caches.deallocate(first)
    with pytest.raises(LLMException, match=f"wanted {POOL}.* free {POOL * 3 // 4}.* {POOL // 2}") as caught:
        caches.allocate(1, POOL, 1, {key(1): 0}, SOON)
    assert caught.value.status_code is LLMStatusCode.LLM_DEVICE_OUT_OF_MEMORY
    caches.allocate(1, POOL // 2, 1, {key(1): 0}, SOON)  # the key of the failed one is free


def test_the_whole_pool_a_thousand_times(caches: CacheTable) -> None:
    for _ in range(1000):
        cache_id, _ = caches.allocate(2, POOL // 2, 1, {}, SOON)
        caches.deallocate(cache_id)
    assert caches.statistics().largest_free == POOL


def claim(claims: Claims, cache_id: int) -> None:
    page = memoryview(claims.segment).cast("Q")
    page[8], page[2] = cache_id, int(cache_id != 0)
    page.release()


@pytest.fixture
def claims(caches: CacheTable) -> Iterator[Claims]:
    """Claim page of a peer, already honoured."""
    page = Claims()
    caches.directory.add_claims(page)
    yield page
    page.close()


def test_claimed_memory_is_retired_until_the_claim_goes(caches: CacheTable, claims: Claims) -> None:
    cache_id, _ = caches.allocate(1, POOL, 1, {key(1): 0}, SOON)
    claim(claims, cache_id)
    caches.remove_key(key(1))
    caches.deallocate(cache_id)
    assert used(caches) == POOL
    assert caches.statistics().caches == 0
    started = time.monotonic()
    with pytest.raises(LLMException, match="free 0"):
        caches.allocate(1, 64, 1, {}, 0.05)
    assert 0.05 <= time.monotonic() - started < 1
    claim(claims, 0)
    caches.allocate(1, POOL, 1, {}, SOON)


def test_an_allocation_waits_for_retired_memory(caches: CacheTable, claims: Claims) -> None:
    cache_id, _ = caches.allocate(1, POOL, 1, {}, SOON)
    claim(claims, cache_id)
    caches.deallocate(cache_id)
    timer = threading.Timer(0.05, claim, (claims, 0))
    timer.start()
    caches.allocate(1, POOL, 1, {}, 10.0)
    timer.join()


def test_claims_of_a_dropped_link_hold_nothing(caches: CacheTable, claims: Claims) -> None:
    cache_id, _ = caches.allocate(1, POOL, 1, {}, SOON)
    claim(claims, cache_id)
    caches.deallocate(cache_id)
    caches.directory.drop_claims(claims)
    caches.forget_peer()
    assert used(caches) == 0


def test_a_destructor_never_waits_for_the_lock(caches: CacheTable) -> None:
    cache_id, _ = caches.allocate(1, 64, 1, {}, SOON)
    with caches.lock:
        caches.deallocate_later(cache_id)  # as the garbage collector would, in the thread that holds the lock
        assert cache_id in caches.by_id
    assert used(caches) == 0


def test_many_threads(caches: CacheTable) -> None:
    """Allocate and free from eight threads: nothing is lost, nothing is given twice."""
    failures: list[BaseException] = []

    def work(thread: int) -> None:
        try:
            for turn in range(200):
                cache_id, addresses = caches.allocate(2, 640, 1, {key(thread * 1000 + turn): 0}, SOON)
                offset = addresses[0] - caches.device.address
                view = caches.device.memory(offset, 1280)
                view[:] = bytes([thread]) * 1280
                assert bytes(view) == bytes([thread]) * 1280
                caches.deallocate(cache_id)
                assert caches.remove_key(key(thread * 1000 + turn))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert caches.statistics()[1:] == (0, POOL, POOL, 0, 0)


def test_a_pool_beyond_the_memory_of_the_host_is_refused() -> None:
    with pytest.raises(LLMException, match="bytes of host memory are available") as caught:
        HostPool(1 << 50)
    assert caught.value.status_code is LLMStatusCode.LLM_DEVICE_OUT_OF_MEMORY


def test_an_allocation_that_the_system_has_no_pages_for_leaves_nothing(
    caches: CacheTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_pages(offset: int, nbytes: int) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(caches.device, "prepare", no_pages)
    with pytest.raises(LLMException, match="Cannot allocate memory") as caught:
        caches.allocate(1, 64, 1, {key(1): 0}, SOON)
    assert caught.value.status_code is LLMStatusCode.LLM_DEVICE_OUT_OF_MEMORY
    monkeypatch.undo()
    assert caches.statistics()[1:] == (0, POOL, POOL, 0, 0)
    caches.allocate(1, POOL, 1, {key(1): 0}, SOON)
