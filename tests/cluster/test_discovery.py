"""Announce, look up, wait, watch; leases that end; cluster ids that are taken."""

from __future__ import annotations

import os
import pickle
import threading
import time
from collections.abc import Callable

import pytest

from llm_datadist import LLMException, LLMRole, LLMStatusCode
from llm_datadist.cluster import Change, ChangeKind, ClusterMember, RegistryClient, RegistryRefused
from tests.cluster import cluster_process as cp
from tests.cluster.conftest import Announce
from tests.cluster.registry_process import RegistryProcess, wait_until
from tests.processes import Member

Members = Callable[[str], Member]
PROMPT, DECODER = LLMRole.PROMPT, LLMRole.DECODER


def ids(client: RegistryClient, **filters: object) -> list[int]:
    return [member.cluster_id for member in client.members(**filters)]  # type: ignore[arg-type]


def test_what_is_announced_is_found(announce: Announce, client: RegistryClient) -> None:
    labels = {"name": "prompt-0", "model": "x"}
    where = "10.0.0.2:26000;10.0.0.2:26001"
    one = announce(2**64 - 1, state="warm", listen_ip_info=where, labels=labels, devices=(3, 5))
    (found,) = client.members()
    assert (found.cluster_id, found.role, found.listen_ip_info) == (2**64 - 1, PROMPT, where)
    assert (found.devices, found.state, found.labels, found.pid) == ((3, 5), "warm", labels, os.getpid())
    assert found.available
    one.announce("ready", labels={"name": "other"})
    (changed,) = client.members()
    assert (changed.state, changed.labels, changed.instance) == ("ready", {"name": "other"}, found.instance)
    assert changed.revision > found.revision
    one.close()
    assert client.members() == []


def test_look_up_by_role_and_labels(announce: Announce, client: RegistryClient) -> None:
    announce(3, DECODER, labels={"zone": "a", "x": "y"})
    announce(2, labels={"zone": "b"})
    first = announce(1, labels={"zone": "a"})
    assert ids(client) == [1, 2, 3]
    assert ids(client, role=PROMPT) == [1, 2]
    assert ids(client, labels={"zone": "a"}) == [1, 3]
    assert ids(client, role=DECODER, labels={"zone": "a", "x": "y"}) == [3]
    assert ids(client, role=DECODER, labels={"zone": "b"}) == []
    assert [one.cluster_id for one in first.wait_for(count=2, timeout_s=5)] == [2, 3], "without itself"


def test_wait_for_members_that_come_later(announce: Announce, driver: ClusterMember) -> None:
    started = time.monotonic()
    with pytest.raises(LLMException, match="0 members of 2") as caught:
        driver.wait_for(role=PROMPT, count=2, timeout_s=0.3)
    assert caught.value.status_code is LLMStatusCode.LLM_TIMEOUT
    assert 0.3 <= time.monotonic() - started < 2
    announce(1)
    second = announce(2, state="starting")
    assert [one.cluster_id for one in driver.wait_for(state="starting", timeout_s=5)] == [2]
    with pytest.raises(LLMException, match="1 members of 2"):
        driver.wait_for(role=PROMPT, count=2, timeout_s=0.1)
    second.announce()
    assert [one.cluster_id for one in driver.wait_for(role=PROMPT, count=2, timeout_s=5)] == [1, 2]


def test_a_thousand_members_are_listed_in_pages(announce: Announce, client: RegistryClient) -> None:
    text = "x" * 250
    labels = {f"{text}{number:02}"[-250:]: text for number in range(24)}  # 12 KiB a member
    for cluster_id in range(40):
        announce(cluster_id, labels=labels)
    assert ids(client) == list(range(40)), "480 KiB, more than a page"


def test_watch_tells_every_change_in_order(announce: Announce, client: RegistryClient) -> None:
    seen: list[Change] = []
    watching = threading.Thread(target=lambda: seen.extend(client.watch(timeout_s=3)))
    one = announce(1, labels={"a": "b"})
    watching.start()
    wait_until(lambda: client.status().requests > 4)
    two = announce(2, DECODER)
    one.announce("busy")
    two.close()
    watching.join()
    kinds = [(change.kind, change.member.cluster_id, change.member.state) for change in seen]
    join, leave, update = ChangeKind.JOIN, ChangeKind.LEAVE, ChangeKind.UPDATE
    # What comes close together is told together: a member that left at once may not be seen at all.
    assert kinds[0][:2] == (join, 1)
    assert [kind for kind in kinds if kind[1] == 2] in ([], [(join, 2, "ready"), (leave, 2, "ready")])
    assert kinds[0] == (join, 1, "busy") or (update, 1, "busy") in kinds
    assert not any(change.expired for change in seen)


def test_a_watch_that_looks_for_a_role_sees_who_leaves_it(
    members: Members, registry: RegistryProcess, client: RegistryClient, free_port: Callable[[], int]
) -> None:
    member = members("prompt")
    member.call(cp.join, PROMPT, 1, free_port(), registry.address)
    watch = client.watch(role=PROMPT, timeout_s=20)
    joined = next(watch)
    assert (joined.kind, joined.member.cluster_id) == (ChangeKind.JOIN, 1)
    switching = member.start(cp.switch, DECODER)
    kinds = []
    for change in watch:
        kinds.append(change.kind)
        if change.kind is ChangeKind.LEAVE:
            break
    assert kinds[-1] is ChangeKind.LEAVE
    assert switching.result()[-1] == "relinking"


def test_a_killed_member_leaves_when_its_lease_ends(
    members: Members, registry: RegistryProcess, driver: ClusterMember, free_port: Callable[[], int]
) -> None:
    seen: list[tuple[Change, float]] = []
    driver.follow(lambda change: seen.append((change, time.monotonic())))
    member = members("prompt")
    member.call(cp.join, PROMPT, 1, free_port(), registry.address, lease_s=1.0)
    driver.wait_for(count=1, timeout_s=5)
    member.kill()
    killed = time.monotonic()
    assert driver.members(), "not before the lease ends"
    wait_until(lambda: not driver.members(), 5)
    change, moment = wait_until(lambda: [one for one in seen if one[0].kind is ChangeKind.LEAVE])[0]
    assert change.expired
    assert 0.5 < moment - killed < 2.5


def test_a_stopped_member_leaves_and_comes_back(
    members: Members, registry: RegistryProcess, driver: ClusterMember, free_port: Callable[[], int]
) -> None:
    member = members("prompt")
    member.call(cp.join, PROMPT, 1, free_port(), registry.address, lease_s=0.5)
    (before,) = driver.wait_for(count=1, timeout_s=5)
    member.stop()
    wait_until(lambda: not driver.members(), 5)
    member.cont()
    (after,) = driver.wait_for(count=1, timeout_s=5)
    assert after.instance == before.instance


def test_leases_are_renewed_while_nothing_else_happens(announce: Announce, client: RegistryClient) -> None:
    announce(1, lease_s=0.3)
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:
        assert ids(client) == [1]


def test_an_id_that_a_living_process_has_is_refused(announce: Announce, client: RegistryClient) -> None:
    first = announce(1, labels={"name": "first"})
    with ClusterMember(None, first._address.endpoint, 1, role=DECODER) as second:
        with pytest.raises(RegistryRefused, match="belongs to another process") as caught:
            second.announce(timeout_s=0.5)
        assert (caught.value.code, caught.value.status_code) == ("taken", LLMStatusCode.LLM_FAILED)
        copy = pickle.loads(pickle.dumps(caught.value))
        assert (str(copy), copy.code) == (str(caught.value), "taken")
        (found,) = client.members()
        assert (found.labels, found.role) == ({"name": "first"}, PROMPT)
        first.close()
        second.announce(timeout_s=5)
    assert client.members() == []


def test_a_process_that_comes_back_need_not_wait_for_the_lease(
    members: Members, registry: RegistryProcess, client: RegistryClient, free_port: Callable[[], int]
) -> None:
    member = members("prompt")
    member.call(cp.join, PROMPT, 1, free_port(), registry.address, lease_s=60.0)
    (before,) = client.members()
    member.kill()
    started = time.monotonic()
    members("prompt again").call(cp.join, PROMPT, 1, free_port(), registry.address)
    assert time.monotonic() - started < 10
    (after,) = client.members()
    assert after.instance != before.instance


def test_what_cannot_be_announced(registry: RegistryProcess, driver: ClusterMember) -> None:
    with pytest.raises(ValueError, match="without cluster id and role"):
        driver.announce()
    with pytest.raises(LLMException, match="needs a datadist"):
        driver.link([])
    with pytest.raises(LLMException, match="needs a datadist"):
        driver.switch_role(PROMPT)
    for address in ("", "tcp://", "tcp://host:0", "tcp://host:70000", "tcp://host:x", "udp://h:1", "tcp://[::1:5"):
        with pytest.raises(ValueError, match="address"):
            ClusterMember(None, address)
    with pytest.raises(TypeError):
        RegistryClient(5510)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="should be host:port"):
        ClusterMember(None, registry.address, 1, "10.0.0.2", role=PROMPT)
    with ClusterMember(None, registry.address, 1, role=PROMPT) as member:
        with pytest.raises(RegistryRefused, match="labels"):
            member.announce(labels={str(number): "" for number in range(33)})
        with pytest.raises(RegistryRefused, match="at most 16384 are kept"):
            member.announce(labels={str(number): "\u20ac" * 256 for number in range(32)})
        with pytest.raises(RegistryRefused, match="state"):
            member.announce("")
        member.announce("ready")


def test_no_registry_at_all(free_port: Callable[[], int]) -> None:
    address = f"tcp://127.0.0.1:{free_port()}"
    with RegistryClient(address) as client:
        started = time.monotonic()
        with pytest.raises(LLMException, match="no answer") as caught:
            client.members(timeout_s=0.3)
        assert caught.value.status_code is LLMStatusCode.LLM_TIMEOUT
        assert time.monotonic() - started < 2
    with ClusterMember(None, address, 1, role=PROMPT) as member, pytest.raises(LLMException, match="no answer"):
        member.announce(timeout_s=0.2)


def test_the_registry_comes_after_the_member(free_port: Callable[[], int]) -> None:
    process = RegistryProcess()
    process.port = free_port()
    with ClusterMember(None, f"tcp://127.0.0.1:{process.port}", 1, role=PROMPT) as member:
        with pytest.raises(LLMException, match="no answer"):
            member.announce(timeout_s=0.1)
        try:
            process.start()
            with RegistryClient(process.address) as client:
                wait_until(lambda: ids(client) == [1])
        finally:
            process.close()


def test_a_client_that_nobody_closes_leaves_nothing(registry: RegistryProcess) -> None:
    assert RegistryClient(registry.address).members() == []
