"""Several processes claim and copy while the owner allocates, removes and reuses: no torn read in a million pulls.

Every cache is filled with words computed from the key's number and a serial number that is new for each allocation, so
that a single word from another key, or from an earlier life of the same key, is seen.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection

import numpy as np
import numpy.typing as npt

from llm_datadist._local import LocalCache
from llm_datadist._outcome import Outcome, TransferFault
from llm_datadist._segment import Segment
from llm_datadist.cluster.local import LocalGroup
from llm_datadist.devices.host import HostPool
from llm_datadist.engine.cache_pool import CachePool
from llm_datadist.engine.caches import CacheTable
from llm_datadist.engine.keys import KeyKind, KeyName
from llm_datadist.transports import rendezvous
from llm_datadist.transports.shared_memory import NUM_DESCRIPTORS, SharedMemoryEnd, SharedMemoryGrant, attach

PULLS = 1_000_000
READERS = 3
NUMBERS = 48  # keys of each kind; few, so that readers and owner meet all the time
WORDS = 96  # of a slot
SLOT_BYTES = 8 * WORDS
POOL_BYTES = 208 * 1024  # holds little more than the live caches: memory comes back at once
DEADLINE_S = 100

Words = npt.NDArray[np.uint64]
_STEPS = np.arange(1, WORDS + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)


def payload(number: int, serial: int) -> Words:
    """Fill a slot: number, serial, then words that mix both with the position."""
    words = (_STEPS ^ np.uint64(number << 40 | serial)) * np.uint64(0xBF58476D1CE4E5B9)
    words[0], words[1] = number, serial
    return words


def is_whole(words: Words, number: int) -> bool:
    return int(words[0]) == number and np.array_equal(words, payload(number, int(words[1])))


def read(connection: Connection, address: str, seed: int, pulls: int) -> None:
    """Child: pull random keys and check every word of what arrives."""
    meeting = rendezvous.connect(address, 10)
    peer = attach(rendezvous.receive_descriptors(meeting, rendezvous.GRANTED, NUM_DESCRIPTORS), pool_writable=False)
    memory = Segment.create("test:reader", 2 * SLOT_BYTES, peers_may_write=False)
    target = LocalCache(1, memory.address, SLOT_BYTES, SLOT_BYTES, SLOT_BYTES, 2, 1)
    words = np.frombuffer(memoryview(memory)[: 2 * SLOT_BYTES], np.uint64).reshape(2, WORDS)
    connection.send("ready")
    connection.recv()  # all readers start together
    counts = pull_many(peer, target, words, random.Random(seed), pulls)
    connection.send(counts)
    connection.recv()  # the owner has counted what is left; the claims go with this process
    del words
    peer.close(time.monotonic_ns() + 10**9)
    memory.close()
    meeting.close()


def pull_many(
    peer: SharedMemoryEnd, target: LocalCache, words: Words, choice: random.Random, pulls: int
) -> Counter[str]:
    counts: Counter[str] = Counter()
    for _ in range(pulls):
        number = choice.randrange(NUMBERS)
        kind = KeyKind.PREFIX if choice.random() < 0.7 else KeyKind.ORDINARY
        words[:, 1] = 0
        try:
            deadline = time.monotonic_ns() + 5 * 10**9
            peer.pull_cache(target, kind, number, 0, 0, 0, SLOT_BYTES, 0, -1, 0, 2, 0, 0, True, deadline)
        except TransferFault as fault:
            counts[fault.outcome.name] += 1
            continue
        good = is_whole(words[0], number) and is_whole(words[1], number) and words[0, 1] == words[1, 1]
        counts["whole" if good else "torn"] += 1
    return counts


def write_until(done: Callable[[], bool], caches: CacheTable, pool: HostPool) -> Counter[str]:
    """Bind, fill, remove and bind again, as fast as one thread can."""
    choice = random.Random(0)
    counts: Counter[str] = Counter()
    lines = np.frombuffer(pool.memory(0, POOL_BYTES), np.uint64)
    prefixes: dict[int, KeyName] = {}
    while not done():
        for _ in range(200):
            counts["written"] += 1
            number = choice.randrange(NUMBERS)
            prefix = (int(KeyKind.PREFIX), number, 0)
            if number in prefixes:
                caches.remove_key(prefix)
            caches.remove_key((int(KeyKind.ORDINARY), number, 0))
            # A cache must be filled before its key can be seen, so it is bound to its keys when it is whole.
            fill_and_bind(caches, lines, pool.address, number, counts["written"], prefix)
            prefixes[number] = prefix
    return counts


def fill_and_bind(caches: CacheTable, lines: Words, base: int, number: int, serial: int, prefix: KeyName) -> None:
    for key in (prefix, (int(KeyKind.ORDINARY), number, 0)):
        cache_id, addresses = caches.allocate(2, SLOT_BYTES, 1, {}, 5.0)
        for address in addresses:
            first = (address - base) // 8
            lines[first : first + WORDS] = payload(number, serial)
        with caches.lock:
            held = caches._held[cache_id]
            index = caches.directory.publish_key(held.entry, key[0], key[1], key[2], 0)
            held.keys[key] = index
            held.entries.append(index)
            caches._keys[key] = held
            caches._key_of_entry[index] = key
        caches.deallocate(cache_id)  # from here on the key alone holds the memory


def test_no_torn_read_in_a_million_pulls() -> None:
    pool = HostPool(POOL_BYTES)
    caches = CacheTable(pool, CachePool(pool.capacity))
    listener, address = rendezvous.listen()
    listener.settimeout(20)
    grants, meetings = [], []
    with LocalGroup() as group:
        workers = [group.start(f"reader-{seed}", read, address, seed, -(-PULLS // READERS)) for seed in range(READERS)]
        for _ in workers:
            meeting, _ = listener.accept()
            rendezvous.require_same_user(meeting)
            grant = SharedMemoryGrant(pool.segment, caches.directory, caches.lock, peer_writes=False)
            grant.send(meeting, rendezvous.GRANTED)
            grants.append(grant)
            meetings.append(meeting)
        assert [worker.connection.recv() for worker in workers] == ["ready"] * READERS
        for worker in workers:
            worker.connection.send("go")
        give_up = time.monotonic() + DEADLINE_S
        written = write_until(
            lambda: all(worker.connection.poll() for worker in workers) or time.monotonic() > give_up, caches, pool
        )
        assert time.monotonic() < give_up, "the readers did not finish"
        counts: Counter[str] = sum((worker.connection.recv() for worker in workers), Counter())
        print(f"owner: {dict(written)}, readers: {dict(counts)}")
        for worker in workers:
            worker.connection.send("end")
            assert worker.wait(10)
    assert counts["torn"] == 0
    assert set(counts) <= {"whole", Outcome.KEY_UNKNOWN.name}, counts
    assert sum(counts.values()) >= PULLS
    assert counts["whole"] >= PULLS // 4
    for number in range(NUMBERS):
        caches.remove_key((int(KeyKind.PREFIX), number, 0))
        caches.remove_key((int(KeyKind.ORDINARY), number, 0))
    assert caches.statistics().used == 0
    assert caches.directory.used_entries == 0
    for grant, meeting in zip(grants, meetings):
        grant.revoke()
        meeting.close()
    listener.close()
    caches.close()
