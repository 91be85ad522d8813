"""Members link to those that come and unlink those that go, over restarts of the registry and deaths of members."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from llm_datadist import LLMException, LLMRole, LLMStatusCode
from llm_datadist.cluster import ClusterMember, RegistryClient
from tests.cluster import cluster_process as cp
from tests.cluster.cluster_process import wait_for_links
from tests.cluster.registry_process import RegistryProcess, wait_until
from tests.processes import Member

Members = Callable[[str], Member]
FreePort = Callable[[], int]
PROMPT, DECODER = LLMRole.PROMPT, LLMRole.DECODER
CACHE_MANAGER = {"llm.EnableCacheManager": "1"}


@pytest.fixture
def start(members: Members, registry: RegistryProcess, free_port: FreePort) -> Callable[..., Member]:
    """Start a member of the cluster."""

    def one(role: LLMRole, cluster_id: int, port: int | None = None, name: str = "", **options: object) -> Member:
        member = members(name or f"{role.name} {cluster_id}")
        member.call(cp.join, role, cluster_id, port or free_port(), registry.address, **options)
        if role is PROMPT and "options" not in options:
            member.call(cp.offer, cp.NBYTES, cluster_id)
        return member

    return one


Start = Callable[..., Member]


def test_decoders_link_to_every_prompt_that_comes(start: Start) -> None:
    early = start(DECODER, 11)
    first = start(PROMPT, 1)
    wait_for_links(early, 1)
    late = start(DECODER, 12)
    wait_for_links(late, 1)
    second = start(PROMPT, 2)
    for decoder in (early, late):
        wait_for_links(decoder, 1, 2)
        assert decoder.call(cp.linked) == [1, 2]
    for prompt in (first, second):
        wait_for_links(prompt, 11, 12)
    assert ("JOIN", 1, "PROMPT", "ready") in early.call(cp.changes)


def test_a_prompt_that_starts_is_not_linked_before_it_is_ready(start: Start) -> None:
    decoder = start(DECODER, 11)
    prompt = start(PROMPT, 1, state_name="starting")
    wait_until(lambda: ("JOIN", 1, "PROMPT", "starting") in decoder.call(cp.changes))
    assert decoder.call(cp.links) == []
    prompt.call(cp.announce, "ready")
    wait_for_links(decoder, 1)


def test_a_member_that_leaves_is_unlinked(start: Start) -> None:
    decoder, prompt, other = start(DECODER, 11), start(PROMPT, 1), start(PROMPT, 2)
    wait_for_links(decoder, 1, 2)
    prompt.call(cp.close_member)
    wait_for_links(decoder, 2)
    wait_for_links(prompt)
    assert ("LEAVE", 1, "PROMPT", "ready") in decoder.call(cp.changes)
    other.call(cp.leave)
    wait_for_links(decoder)
    decoder.call(cp.leave)


def test_without_links_of_its_own_accord(start: Start) -> None:
    decoder = start(DECODER, 11, link=False)
    start(PROMPT, 1)
    prompt = start(PROMPT, 2)
    assert decoder.call(cp.wait_for, PROMPT, 2) == [1, 2]
    assert decoder.call(cp.links) == []
    decoder.call(cp.link, PROMPT, 2)
    wait_for_links(decoder, 1, 2)
    prompt.kill()
    wait_for_links(decoder, 1)


def test_a_killed_prompt_is_unlinked_and_linked_again_when_it_is_back(start: Start, free_port: FreePort) -> None:
    port = free_port()
    decoder, prompt = start(DECODER, 11), start(PROMPT, 1, port)
    wait_for_links(decoder, 1)
    prompt.kill()
    wait_for_links(decoder)
    start(PROMPT, 1, port, name="again")
    wait_for_links(decoder, 1)


def test_a_killed_decoder_vanishes_everywhere(start: Start, client: RegistryClient) -> None:
    decoder, prompt = start(DECODER, 11), start(PROMPT, 1)
    wait_for_links(prompt, 11)
    decoder.kill()
    wait_for_links(prompt)
    wait_until(lambda: [one.cluster_id for one in client.members()] == [1])
    wait_until(lambda: ("LEAVE", 11, "DECODER", "ready") in prompt.call(cp.changes))


@pytest.mark.parametrize("away_s", [0.0, 2.5], ids=["at once", "after longer than a lease"])
def test_the_registry_is_killed_and_comes_back(
    start: Start, registry: RegistryProcess, client: RegistryClient, away_s: float
) -> None:
    decoder, prompt = start(DECODER, 11), start(PROMPT, 1)
    wait_for_links(decoder, 1)
    pulling = decoder.start(cp.pull_on_and_on, [1], cp.NBYTES)
    registry.kill()
    ends = time.monotonic() + away_s
    while time.monotonic() < ends:
        assert decoder.call(cp.links) == [(1, "LINKED")], "links go on without the registry"
    registry.start()
    wait_until(lambda: [one.cluster_id for one in client.members()] == [1, 11], what="both announced again")
    late = start(DECODER, 12)
    wait_for_links(late, 1)
    decoder.call(cp.stop_pulling)
    tally = pulling.result()
    assert tally.pulls > 0
    assert (tally.failures, tally.wrong, tally.not_linked) == ([], 0, 0), "nobody noticed"
    assert [change for change in decoder.call(cp.changes) if change[0] == "LEAVE"] == []
    wait_for_links(prompt, 11, 12)


def test_a_member_dies_while_the_registry_is_away(start: Start, registry: RegistryProcess) -> None:
    decoder, prompt = start(DECODER, 11), start(PROMPT, 1)
    start(PROMPT, 2)
    wait_for_links(decoder, 1, 2)
    registry.kill()
    prompt.kill()
    wait_for_links(decoder, 2)
    registry.start()
    wait_until(lambda: ("LEAVE", 1, "PROMPT", "ready") in decoder.call(cp.changes), what="it does not come back")
    wait_for_links(decoder, 2)


def test_cache_manager_mode(start: Start) -> None:
    prompt = start(PROMPT, 1, options=CACHE_MANAGER)
    decoder = start(DECODER, 11, options=CACHE_MANAGER)
    wait_for_links(decoder, 1)
    mixed = start(LLMRole.MIX, 21, options=CACHE_MANAGER, roles=[PROMPT, DECODER])
    wait_for_links(mixed, 1, 11)
    wait_for_links(prompt, 11, 21)
    prompt.call(cp.close_member)
    wait_for_links(mixed, 11)
    mixed.call(cp.leave)
    wait_for_links(decoder)


def test_the_program_s_callback_fails(start: Start, registry: RegistryProcess) -> None:
    with ClusterMember(None, registry.address) as driver:
        seen = []

        def fail(change: object) -> None:
            seen.append(change)
            raise RuntimeError("of the test")

        driver.follow(fail)
        start(PROMPT, 1)
        start(PROMPT, 2)
        wait_until(lambda: len(seen) >= 2, what="it is called again")


def test_transfers_need_a_link(start: Start) -> None:
    decoder = start(DECODER, 11)
    with pytest.raises(LLMException, match="cluster 1 is not linked, linked are") as caught:
        decoder.call(transfer, 1)
    assert caught.value.status_code is LLMStatusCode.LLM_NOT_YET_LINK
    start(PROMPT, 1)
    wait_for_links(decoder, 1)
    decoder.call(transfer, 1)


def transfer(state: cp.State, cluster_id: int) -> None:
    with state["member"].transfer(cluster_id):
        pass


def test_a_peer_that_cannot_be_linked(start: Start, announce: Callable[..., ClusterMember]) -> None:
    decoder = start(DECODER, 11)
    announce(5, listen_ip_info="127.0.0.1:1")
    announce(6, listen_ip_info="no.such.host.invalid:1")
    announce(7, listen_ip_info="127.0.0.1:1;127.0.0.1:2")
    start(PROMPT, 1)
    wait_for_links(decoder, 1)
    with pytest.raises(LLMException, match="cannot link to") as caught:
        decoder.call(link_for, 0.5)
    assert caught.value.status_code is LLMStatusCode.LLM_LINK_FAILED
    assert all(f"{one}:" in str(caught.value) for one in (5, 6, 7))


def link_for(state: cp.State, timeout_s: float) -> None:
    member = state["member"]
    member.link(member.wait_for(role=PROMPT, count=4, timeout_s=5), timeout_s)


def test_who_follows_late_is_told_of_those_that_are_there(start: Start, registry: RegistryProcess) -> None:
    start(PROMPT, 1)
    with ClusterMember(None, registry.address) as driver:
        driver.wait_for(count=1, timeout_s=5)
        seen = []
        driver.follow(lambda change: seen.append((change.kind.name, change.member.cluster_id)))
        wait_until(lambda: seen == [("JOIN", 1)])
        start(PROMPT, 2)
        wait_until(lambda: seen == [("JOIN", 1), ("JOIN", 2)])


def test_a_broken_link_is_no_obstacle(start: Start, free_port: FreePort) -> None:
    port = free_port()
    decoder, prompt = start(DECODER, 11, link=False, follow=False), start(PROMPT, 1, port)
    decoder.call(cp.link, PROMPT, 1)
    prompt.kill()
    start(PROMPT, 1, port, name="again")
    decoder.call(cp.link, PROMPT, 1)
    wait_for_links(decoder, 1)


def test_the_instance_is_finalized_before_the_member_is_closed(start: Start) -> None:
    decoder, prompt = start(DECODER, 11), start(PROMPT, 1)
    wait_for_links(decoder, 1)
    decoder.call(finalize_first)
    wait_for_links(prompt)


def finalize_first(state: cp.State) -> None:
    state["datadist"].finalize()
    state["member"].close()


PROGRAM = """
import sys
from llm_datadist import LLMRole
from llm_datadist.cluster import ClusterMember, RegistryClient
member = ClusterMember(None, sys.argv[1], 1, role=LLMRole.PROMPT, lease_s=0.5)
member.announce()
member.follow(print)
client = RegistryClient(sys.argv[1])
print([one.cluster_id for one in client.members()])
"""


def test_a_program_that_closes_nothing_ends(registry: RegistryProcess, client: RegistryClient) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, registry.address], capture_output=True, text=True, timeout=20, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "[1]\n", "")
    wait_until(lambda: client.members() == [], what="its lease ends")


def test_a_prompt_without_an_address(start: Start) -> None:
    prompt = start(PROMPT, 1)
    with pytest.raises(ValueError, match="give it listen_ip_info"):
        prompt.call(announce_without_an_address)
    with pytest.raises(ValueError, match="that of the datadist is 1"):
        prompt.call(make_with_another_id)


def announce_without_an_address(state: cp.State) -> None:
    with ClusterMember(state["datadist"], "tcp://127.0.0.1:5510") as member:
        member.announce()


def make_with_another_id(state: cp.State) -> None:
    ClusterMember(state["datadist"], "tcp://127.0.0.1:5510", 2)
