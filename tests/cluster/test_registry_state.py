"""What a registry and a client keep, without sockets and with a clock of the test."""

from __future__ import annotations

import random

import pytest

from llm_datadist import LLMRole
from llm_datadist.cluster.cluster_view import ClusterView
from llm_datadist.cluster.member_info import ChangeKind
from llm_datadist.cluster.registry_address import RegistryAddress, parse_registry_address
from llm_datadist.cluster.registry_locks import ROLE_SWITCH, RegistryLocks, Waiter
from llm_datadist.cluster.registry_messages import Changes
from llm_datadist.cluster.registry_table import MAX_GONE, NEW, PAGE_ITEMS, SAME, RegistryTable
from tests.cluster.test_hostile_clients import announcement

EPOCH, OTHER_EPOCH = b"e" * 16, b"f" * 16


def table() -> RegistryTable:
    return RegistryTable(EPOCH, 100_000)


def look(view: ClusterView, members: RegistryTable, role: int = 0, now: float = 0.0) -> list[tuple[ChangeKind, int]]:
    """Let a client look until it knows everything; gives what changed for it."""
    found = []
    while True:
        question = view.next_look(role, {}, 0)
        changes = members.changes(question.epoch, question.since, question.role, question.labels)
        found += [(change.kind, change.member.cluster_id) for change in view.apply(changes, now)]
        if not changes.more:
            return found


JOIN, LEAVE, ROLE, UPDATE = ChangeKind.JOIN, ChangeKind.LEAVE, ChangeKind.ROLE, ChangeKind.UPDATE


def test_a_client_is_told_what_changed_since_it_looked() -> None:
    members, view = table(), ClusterView()
    assert look(view, members) == []
    assert view.is_complete
    for cluster_id in (1, 2):
        assert members.announce(announcement(cluster_id=cluster_id), 1000, b"peer", 0.0) == NEW
    assert look(view, members) == [(JOIN, 1), (JOIN, 2)]
    assert look(view, members) == []
    members.announce(announcement(cluster_id=1, version=2, role=2), 1000, b"peer", 0.0)
    members.announce(announcement(cluster_id=2, version=2, state="busy"), 1000, b"peer", 0.0)
    assert look(view, members) == [(ROLE, 1), (UPDATE, 2)]
    members.remove(1, expired=False)
    members.announce(announcement(cluster_id=2, version=3, instance=b"j" * 16), 1000, b"peer", 0.0)
    assert look(view, members) == [(LEAVE, 2), (JOIN, 2), (LEAVE, 1)]


def test_an_older_announcement_that_comes_late_changes_nothing() -> None:
    members, view = table(), ClusterView()
    members.announce(announcement(version=5, state="new"), 1000, b"peer", 0.0)
    assert members.announce(announcement(version=4, state="old"), 1000, b"peer", 0.0) == SAME
    look(view, members)
    assert view.members[5].state == "new"


def test_leases_end_when_they_are_not_renewed() -> None:
    members = table()
    for cluster_id, lease_ms in ((1, 1000), (2, 2000), (3, 10_000)):
        members.announce(announcement(cluster_id=cluster_id), lease_ms, b"peer", 0.0)
    assert members.next_expiry() == 1.0
    assert members.renew(1, b"i" * 16, b"peer", 0.9) == 1000
    assert members.renew(1, b"x" * 16, b"peer", 0.9) is None
    assert members.expire(1.0) == []
    assert members.expire(2.0) == [(1, b"i" * 16), (2, b"i" * 16)]
    assert len(members) == 1
    # A shorter lease than before counts at once.
    members.announce(announcement(cluster_id=3, version=2), 500, b"peer", 2.0)
    assert members.expire(2.6) == [(3, b"i" * 16)]
    assert members.expire(100.0) == []
    assert members.next_expiry() is None


@pytest.mark.parametrize("seed", range(5))
def test_any_client_ends_up_with_what_the_registry_has(seed: int) -> None:
    choose = random.Random(seed)
    members, views = table(), [ClusterView() for _ in range(4)]
    for version in range(3000):
        cluster_id = choose.randrange(40)
        if choose.random() < 0.3:
            members.remove(cluster_id, choose.random() < 0.5)
        else:
            change = announcement(cluster_id=cluster_id, version=version, role=choose.choice([1, 2]))
            members.announce(change, 1000, b"peer", 0.0)
        if choose.random() < 0.1:
            look(choose.choice(views), members)
    everyone = ClusterView()
    look(everyone, members)
    for view in views:
        look(view, members)
        assert view.members == everyone.members
    prompts = ClusterView()
    look(prompts, members, role=1)
    assert prompts.members == {k: v for k, v in everyone.members.items() if v.role is LLMRole.PROMPT}


def test_one_that_looks_for_a_role_is_told_when_a_member_leaves_it() -> None:
    members, view = table(), ClusterView()
    members.announce(announcement(role=1), 1000, b"peer", 0.0)
    assert look(view, members, role=1) == [(JOIN, 5)]
    members.announce(announcement(role=2, version=2), 1000, b"peer", 0.0)
    assert look(view, members, role=1) == [(LEAVE, 5)]


def test_more_leave_than_are_remembered() -> None:
    members, view = table(), ClusterView()
    members.announce(announcement(cluster_id=1), 1000, b"peer", 0.0)
    members.announce(announcement(cluster_id=2), 1000, b"peer", 0.0)
    look(view, members)
    members.remove(2, expired=True)
    for cluster_id in range(10, 10 + 2 * MAX_GONE):
        members.announce(announcement(cluster_id=cluster_id), 1000, b"peer", 0.0)
        members.remove(cluster_id, expired=True)
    assert len(members._items) <= MAX_GONE + 1
    assert look(view, members) == [], "it is told everything again, and waits for those that are missing"
    assert [change.kind for change in view.expire(1.5)] == [LEAVE]
    assert list(view.members) == [1]


def test_everything_is_told_in_pages() -> None:
    members, view = table(), ClusterView()
    for cluster_id in range(PAGE_ITEMS + 10):
        members.announce(announcement(cluster_id=cluster_id), 1000, b"peer", 0.0)
    first = members.changes(b"", 0, 0, {})
    assert (first.reset, first.more, len(first.members)) == (True, True, PAGE_ITEMS)
    view.apply(first, 0.0)
    assert not view.is_complete
    members.remove(3, expired=False)  # of the first page
    assert look(view, members)[-1] == (LEAVE, 3)
    assert view.is_complete
    assert len(view.members) == PAGE_ITEMS + 9


def test_a_registry_that_was_started_again_is_given_time() -> None:
    members, view = table(), ClusterView()
    for cluster_id in (1, 2, 3):
        members.announce(announcement(cluster_id=cluster_id), 2000, b"peer", 0.0)
    look(view, members)
    again = RegistryTable(OTHER_EPOCH, 10)
    again.announce(announcement(cluster_id=1), 2000, b"peer", 10.0)
    assert look(view, again, now=10.0) == []
    assert set(view.members) == {1, 2, 3}
    assert view.next_expiry() == 12.0
    again.announce(announcement(cluster_id=2, role=2), 2000, b"peer", 11.0)
    assert look(view, again, now=11.0) == [(ROLE, 2)]
    assert [change.member.cluster_id for change in view.expire(12.0)] == [3]
    assert view.next_expiry() is None


def test_a_record_that_cannot_be_read_is_left_out() -> None:
    view = ClusterView()
    assert view.apply(Changes(EPOCH, 1, True, False, [b"\xc1", b""], [], []), 0.0) == []
    assert view.members == {}


# ---- locks


def waiter(number: int, now: float, wait_s: float = 10.0) -> Waiter:
    return Waiter(number, bytes([number]) * 16, 1000, now + wait_s, b"peer", bytes([number]) * 8)


def granted(locks: RegistryLocks, now: float) -> list[tuple[int, int]]:
    return [(one.cluster_id, holder.token) for one, holder in locks.serve(now)[0]]


def test_a_lock_goes_round_in_the_order_of_asking() -> None:
    locks = RegistryLocks(0.0, 0.0)
    for number in (1, 2, 3):
        locks.wait(ROLE_SWITCH, waiter(number, 0.0))
    ((first, token),) = granted(locks, 0.0)
    assert first == 1
    assert granted(locks, 0.5) == []
    assert not locks.release(ROLE_SWITCH, b"\x02" * 16, token, 0.5)
    assert not locks.release(ROLE_SWITCH, b"\x01" * 16, token + 1, 0.5)
    assert locks.release(ROLE_SWITCH, b"\x01" * 16, token, 0.5)
    ((second, next_token),) = granted(locks, 0.5)
    assert (second, next_token > token) == (2, True)
    ((third, last_token),) = granted(locks, 1.6)  # the lease of the second has ended
    assert (third, last_token > next_token) == (3, True)
    assert locks.keep(ROLE_SWITCH, 2, b"\x02" * 16, next_token, 1000, 1.7) is None, "its token is out of date"
    assert not locks.is_current(ROLE_SWITCH, next_token, b"\x02" * 16, 1.7)


def test_who_waits_too_long_is_told() -> None:
    locks = RegistryLocks(0.0, 0.0)
    locks.wait(ROLE_SWITCH, waiter(1, 0.0))
    granted(locks, 0.0)
    locks.wait(ROLE_SWITCH, waiter(2, 0.0, wait_s=0.5))
    assert locks.next_due() == 0.5
    assert [one.cluster_id for one in locks.serve(0.5)[1]] == [2]


def test_the_locks_of_one_that_is_gone_are_free() -> None:
    locks = RegistryLocks(0.0, 0.0)
    for number in (1, 2, 3):
        locks.wait(ROLE_SWITCH, waiter(number, 0.0))
    granted(locks, 0.0)
    locks.forget(b"\x02" * 16)
    locks.forget(b"\x01" * 16)
    assert [number for number, _ in granted(locks, 0.1)] == [3]


def test_a_lock_outlives_the_registry() -> None:
    before = RegistryLocks(0.0, 0.0)
    before.wait(ROLE_SWITCH, waiter(1, 0.0))
    ((_, token),) = granted(before, 0.0)
    after = RegistryLocks(0.0, 5.0)
    after.wait(ROLE_SWITCH, waiter(2, 0.0, wait_s=100))
    assert granted(after, 1.0) == [], "the holder may still come back"
    assert after.next_due() == 5.0
    holder = after.keep(ROLE_SWITCH, 1, b"\x01" * 16, token, 3000, 2.0)
    assert holder is not None
    assert holder.token == token
    ((number, later),) = granted(after, 5.1)
    assert (number, later > token) == (2, True)
    assert after.keep(ROLE_SWITCH, 1, b"\x01" * 16, token, 3000, 5.2) is None


def test_tokens_stay_above_all_that_were_seen() -> None:
    locks = RegistryLocks(0.0, 0.0)
    locks.wait(ROLE_SWITCH, waiter(1, 0.0))
    ((_, token),) = granted(locks, 0.0)
    locks.see(token + 1_000_000)
    locks.see(2**64 - 1)  # nobody can have got this one
    locks.forget(b"\x01" * 16)
    locks.wait(ROLE_SWITCH, waiter(2, 0.0))
    assert granted(locks, 0.0) == [(2, token + 1_000_001)]


def test_acknowledgements_belong_to_a_token() -> None:
    locks = RegistryLocks(0.0, 0.0)
    locks.wait(ROLE_SWITCH, waiter(1, 0.0))
    ((_, token),) = granted(locks, 0.0)
    assert locks.acknowledge(ROLE_SWITCH, token, 11, 0.1)
    assert not locks.acknowledge(ROLE_SWITCH, token - 1, 12, 0.1)
    holder = locks.keep(ROLE_SWITCH, 1, b"\x01" * 16, token, 1000, 0.2)
    assert holder is not None
    assert holder.drained == {11}


# ---- addresses


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("tcp://registry:5511", ("registry", 5511)),
        ("registry", ("registry", 5510)),
        ("10.0.0.1:1", ("10.0.0.1", 1)),
        ("tcp://[fe80::1]:6000", ("fe80::1", 6000)),
        ("[::1]", ("::1", 5510)),
        ("::1", ("::1", 5510)),
    ],
)
def test_an_address_is_read(text: str, address: tuple[str, int]) -> None:
    assert parse_registry_address(text) == address


def test_an_address_is_written() -> None:
    assert RegistryAddress("::1", 6000).endpoint == "tcp://[::1]:6000"
    assert RegistryAddress("h", 6000).endpoint == "tcp://h:6000"
