"""Role switches that the whole cluster takes part in: under load, side by side, and with deaths in the middle."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from llm_datadist import LLMException, LLMRole, LLMStatusCode
from llm_datadist.cluster import RegistryClient
from tests.cluster import cluster_process as cp
from tests.cluster.cluster_process import wait_for_links
from tests.cluster.registry_process import RegistryProcess, wait_until
from tests.cluster.test_following import FreePort, Members, Start, start
from tests.processes import Member

__all__ = ["start"]

PROMPT, DECODER = LLMRole.PROMPT, LLMRole.DECODER
PHASES = ["waiting", "draining", "unlinking", "switching", "announcing", "relinking"]
LONG = 8 << 20  # bytes of a tensor: a pull takes a while
CACHE_MANAGER = {"llm.EnableCacheManager": "1"}


def test_a_prompt_becomes_a_decoder_and_back(start: Start, free_port: FreePort) -> None:
    port = free_port()
    first, second, decoder = start(PROMPT, 1, port), start(PROMPT, 2), start(DECODER, 11)
    wait_for_links(decoder, 1, 2)
    assert first.call(cp.switch, DECODER) == PHASES
    assert first.call(cp.role_of) == "DECODER"
    wait_for_links(first, 2)
    wait_for_links(decoder, 2)
    wait_for_links(second, 1, 11)
    assert ("ROLE", 1, "DECODER", "ready") in decoder.call(cp.changes)
    first.call(cp.switch, PROMPT)
    wait_for_links(first, 11)
    wait_for_links(decoder, 1, 2)
    wait_for_links(second, 11)


def test_no_pull_fails_while_prompts_and_decoders_switch(start: Start, free_port: FreePort) -> None:
    prompts = [start(PROMPT, number) for number in (1, 2)]
    for number, prompt in enumerate(prompts, 1):
        prompt.call(cp.offer_long, LONG, number)
    decoders = [start(DECODER, number) for number in (11, 12, 13)]
    for decoder in decoders:
        wait_for_links(decoder, 1, 2)
    pulling = [decoder.start(cp.pull_on_and_on, [1, 2], LONG, prefix=cp.LONG_PREFIX) for decoder in decoders[:2]]
    for decoder in decoders[:2]:
        wait_until(lambda decoder=decoder: decoder.call(cp.pulled) > 2, 30)  # type: ignore[misc]
    for _ in range(2):
        prompts[0].call(cp.switch, DECODER)
        wait_for_links(prompts[0], 2)
        prompts[0].call(cp.switch, PROMPT)
        decoders[2].call(cp.switch, PROMPT, free_port())
        wait_for_links(decoders[0], 1, 2, 13)
        decoders[2].call(cp.switch, DECODER)
        wait_for_links(decoders[2], 1, 2)
    for decoder, call in zip(decoders, pulling):
        decoder.call(cp.stop_pulling)
        tally = call.result(60)
        assert (tally.failures, tally.wrong) == ([], 0)
        assert min(tally.by_cluster.values()) > 0


def test_the_one_who_switches_pulls_itself(start: Start, free_port: FreePort) -> None:
    start(PROMPT, 1).call(cp.offer_long, LONG, 1)
    decoder = start(DECODER, 11)
    wait_for_links(decoder, 1)
    pulling = decoder.start(cp.pull_on_and_on, [1], LONG, prefix=cp.LONG_PREFIX)
    wait_until(lambda: decoder.call(cp.pulled) > 2, 30)
    decoder.call(cp.switch, PROMPT, free_port())
    wait_until(lambda: decoder.call(cp.not_linked) > 0, what="pulls are told that there is no link any more")
    decoder.call(cp.switch, DECODER)
    before = decoder.call(cp.pulled)
    wait_until(lambda: decoder.call(cp.pulled) > before + 2, 30)
    decoder.call(cp.stop_pulling)
    tally = pulling.result()
    assert (tally.failures, tally.wrong) == ([], 0)


def test_no_push_fails_while_the_decoder_switches(start: Start, free_port: FreePort) -> None:
    prompt, decoder = start(PROMPT, 1), start(DECODER, 11)
    wait_for_links(prompt, 11)
    addresses = decoder.call(cp.receive_pushes, LONG)
    pushing = prompt.start(cp.push_on_and_on, 11, addresses, LONG)
    for _ in range(2):
        before = prompt.call(cp.pulled)
        wait_until(lambda before=before: prompt.call(cp.pulled) > before + 2, 30)  # type: ignore[misc]
        refused = prompt.call(cp.not_linked)
        decoder.call(cp.switch, PROMPT, free_port())
        wait_until(lambda refused=refused: prompt.call(cp.not_linked) > refused)  # type: ignore[misc]
        decoder.call(cp.switch, DECODER)
    wait_for_links(prompt, 11)
    prompt.call(cp.stop_pulling)
    tally = pushing.result()
    assert tally.failures == []
    assert tally.pulls > 4


def test_a_transfer_that_does_not_end_gives_the_switch_up(start: Start) -> None:
    prompt, decoder = start(PROMPT, 1), start(DECODER, 11)
    wait_for_links(decoder, 1)
    held = decoder.start(hold_transfer, 1)
    wait_until(lambda: decoder.call(is_held))
    # The peer does not say that it has drained; its link is idle, since nothing is pulled: the switch goes on.
    assert prompt.call(cp.switch, DECODER, timeout_s=2.0) == PHASES
    decoder.call(let_go)
    held.result()
    prompt.call(cp.switch, PROMPT)
    wait_for_links(decoder, 1)
    held = decoder.start(hold_transfer, 1)
    wait_until(lambda: decoder.call(is_held))
    with pytest.raises(LLMException, match="did not end in time") as caught:
        decoder.call(cp.switch, PROMPT, timeout_s=1.0)
    assert caught.value.status_code is LLMStatusCode.LLM_LINK_BUSY
    decoder.call(let_go)
    held.result()
    wait_for_links(decoder, 1)
    assert decoder.call(cp.role_of) == "DECODER"
    decoder.call(transfer_now, 1)


def hold_transfer(state: cp.State, cluster_id: int) -> None:
    state["holding"] = threading.Event()
    with state["member"].transfer(cluster_id):
        state["held"] = True
        state["holding"].wait(30)
    state["held"] = False


def let_go(state: cp.State) -> None:
    state["holding"].set()


def is_held(state: cp.State) -> bool:
    return bool(state.get("held"))


def transfer_now(state: cp.State, cluster_id: int) -> None:
    with state["member"].transfer(cluster_id, timeout_s=5):
        pass


def test_a_switch_that_fails_leaves_everything_as_it_was(start: Start, free_port: FreePort) -> None:
    port = free_port()
    prompt, decoder = start(PROMPT, 1, port), start(DECODER, 11)
    wait_for_links(decoder, 1)
    with pytest.raises(LLMException, match="cannot listen on"):
        decoder.call(cp.switch, PROMPT, port)
    assert decoder.call(cp.phases) == PHASES[:4]
    wait_for_links(decoder, 1)
    assert decoder.call(cp.linked) == [1]
    with pytest.raises(LLMException, match="role not changed"):
        decoder.call(cp.switch, DECODER)
    decoder.call(cp.switch, PROMPT, free_port())
    wait_for_links(prompt)


def test_switches_at_the_same_time_follow_each_other(start: Start, free_port: FreePort) -> None:
    decoders = [start(DECODER, number) for number in (11, 12, 13)]
    start(PROMPT, 1)
    for decoder in decoders:
        wait_for_links(decoder, 1)
    first = decoders[0].start(cp.switch, PROMPT, free_port(), stop_in="switching")
    wait_until(lambda: decoders[0].call(cp.phases) == PHASES[:4])
    others = [decoder.start(cp.switch, PROMPT, free_port()) for decoder in decoders[1:]]
    for decoder in decoders[1:]:
        wait_until(lambda decoder=decoder: decoder.call(cp.phases) == ["waiting"])  # type: ignore[misc]
    with pytest.raises(LLMException, match="is under way") as caught:
        decoders[0].call(switch_once_more, PROMPT)
    assert caught.value.status_code is LLMStatusCode.LLM_PROCESSING_LINK
    assert [decoder.call(cp.phases) for decoder in decoders[1:]] == [["waiting"]] * 2
    decoders[0].call(cp.go_on)
    for call in (first, *others):
        assert call.result() == PHASES
    spans = sorted(decoder.call(cp.span) for decoder in decoders)
    for (_, ended), (began, _) in zip(spans, spans[1:]):
        assert began >= ended, "the clock of one host"
    late = start(DECODER, 14)
    wait_for_links(late, 1, 11, 12, 13)


def test_one_that_waits_for_its_turn_closes(start: Start, free_port: FreePort) -> None:
    first, second, third = (start(DECODER, number) for number in (11, 12, 13))
    switching = first.start(cp.switch, PROMPT, free_port(), stop_in="switching")
    wait_until(lambda: first.call(cp.phases) == PHASES[:4])
    waiting = second.start(cp.switch, PROMPT, free_port())
    wait_until(lambda: second.call(cp.phases) == ["waiting"])
    behind = third.start(cp.switch, PROMPT, free_port())
    wait_until(lambda: third.call(cp.phases) == ["waiting"])
    started = time.monotonic()
    second.call(cp.close_member)
    with pytest.raises(LLMException, match="the member is closed"):
        waiting.result()
    assert time.monotonic() - started < 3
    first.call(cp.go_on)
    assert switching.result() == PHASES
    assert behind.result() == PHASES, "the one that closed does not stand in the way"


def switch_once_more(state: cp.State, role: LLMRole) -> None:
    state["member"].switch_role(role)


@pytest.mark.parametrize("phase", PHASES)
def test_death_in_each_phase_and_the_next_attempt(
    start: Start, client: RegistryClient, free_port: FreePort, phase: str
) -> None:
    port = free_port()
    dying, other, decoder = start(PROMPT, 1, port), start(PROMPT, 2), start(DECODER, 11)
    wait_for_links(decoder, 1, 2)
    pulling = decoder.start(cp.pull_on_and_on, [2], cp.NBYTES)
    dying.start(cp.switch, DECODER, stop_in=phase)
    wait_until(lambda: phase in dying.call(cp.phases))
    if phase in ("unlinking", "switching"):
        wait_for_links(decoder, 2)
    dying.kill()
    # The next attempt, of another member, is not kept waiting for longer than the lease.
    started = time.monotonic()
    assert other.call(cp.switch, DECODER) == PHASES
    assert time.monotonic() - started < cp.LEASE_S + 4
    other.call(cp.switch, PROMPT)
    wait_until(lambda: [one.cluster_id for one in client.members()] == [2, 11])
    wait_for_links(decoder, 2)
    # The one that died comes back and makes its own attempt.
    again = start(PROMPT, 1, port, name="again")
    wait_for_links(decoder, 1, 2)
    decoder.call(transfer_now, 1)
    assert again.call(cp.switch, DECODER) == PHASES
    wait_for_links(again, 2)
    decoder.call(cp.stop_pulling)
    tally = pulling.result()
    assert (tally.failures, tally.wrong) == ([], 0)


def test_a_peer_dies_while_another_drains(start: Start) -> None:
    prompt, decoder, other = start(PROMPT, 1), start(DECODER, 11), start(DECODER, 12)
    wait_for_links(prompt, 11, 12)
    other.call(hold_briefly, 1)
    switching = prompt.start(cp.switch, DECODER)
    wait_until(lambda: "draining" in prompt.call(cp.phases))
    other.kill()
    assert switching.result() == PHASES
    wait_for_links(decoder)


def hold_briefly(state: cp.State, cluster_id: int) -> None:
    threading.Thread(target=hold_transfer, args=(state, cluster_id), daemon=True).start()
    wait_until(lambda: state.get("held"))


def test_a_peer_is_stopped_while_another_drains(start: Start) -> None:
    prompt, decoder = start(PROMPT, 1), start(DECODER, 11, lease_s=60.0)
    wait_for_links(prompt, 11)
    decoder.stop()
    try:
        started = time.monotonic()
        assert prompt.call(cp.switch, DECODER, timeout_s=3.0) == PHASES
        assert time.monotonic() - started < 8
    finally:
        decoder.cont()


# Members have as long as the lease of the lock to come back.
with_patience = pytest.mark.parametrize("registry", [("--lock-lease", "8")], indirect=True, ids=["patient"])


@with_patience
def test_the_registry_dies_in_the_middle(start: Start, registry: RegistryProcess) -> None:
    prompt, decoder = start(PROMPT, 1), start(DECODER, 11)
    wait_for_links(decoder, 1)
    switching = prompt.start(cp.switch, DECODER, stop_in="unlinking")
    wait_until(lambda: "unlinking" in prompt.call(cp.phases))
    registry.kill()
    registry.start()
    prompt.call(cp.go_on)
    assert switching.result() == PHASES, "it shows its token and has the lock again"
    wait_for_links(decoder)
    wait_until(lambda: ("ROLE", 1, "DECODER", "ready") in decoder.call(cp.changes))
    assert decoder.call(cp.switch, PROMPT) == PHASES
    wait_for_links(prompt, 11)


@with_patience
def test_the_registry_dies_while_a_decoder_drains(start: Start, registry: RegistryProcess) -> None:
    prompts, decoder = [start(PROMPT, number) for number in (1, 2)], start(DECODER, 11)
    wait_for_links(decoder, 1, 2)
    prompts[0].call(hold_briefly, 11)
    switching = decoder.start(cp.switch, LLMRole.MIX, timeout_s=100.0)
    wait_until(lambda: "draining" in decoder.call(cp.phases))
    wait_until(lambda: ("UPDATE", 11, "DECODER", "draining") in prompts[1].call(cp.changes))
    registry.kill()
    registry.start()
    prompts[0].call(let_go)
    started = time.monotonic()
    assert switching.result() == PHASES
    assert time.monotonic() - started < 20, "who has drained is not waited for in vain"


def test_announce_waits_for_a_switch(start: Start, client: RegistryClient) -> None:
    prompt, decoder = start(PROMPT, 1), start(DECODER, 11)
    wait_for_links(decoder, 1)
    switching = prompt.start(cp.switch, DECODER, stop_in="unlinking")
    wait_until(lambda: "unlinking" in prompt.call(cp.phases))
    announcing = prompt.start(cp.announce, "busy")
    assert [one.state for one in client.members(role=PROMPT)] == ["draining"]
    prompt.call(cp.go_on)
    assert switching.result() == PHASES
    announcing.result()
    assert {one.cluster_id: (one.role, one.state) for one in client.members()} == {
        1: (DECODER, "busy"),
        11: (DECODER, "ready"),
    }


def test_one_that_is_held_up_for_too_long_gives_up(start: Start) -> None:
    slow, other, decoder = start(PROMPT, 1), start(PROMPT, 2), start(DECODER, 11)
    wait_for_links(decoder, 1, 2)
    switching = slow.start(cp.switch, DECODER, stop_in="switching")
    wait_until(lambda: "switching" in slow.call(cp.phases))
    slow.stop()
    try:
        assert other.call(cp.switch, DECODER) == PHASES, "the lock was free when its lease had ended"
    finally:
        slow.cont()
    slow.call(cp.go_on)
    with pytest.raises(LLMException, match="the lock with token") as caught:
        switching.result()
    assert caught.value.status_code is LLMStatusCode.LLM_FAILED
    assert slow.call(cp.role_of) == "PROMPT"
    wait_for_links(decoder, 1)
    wait_for_links(other, 1)


def test_cache_manager_mode(start: Start, free_port: FreePort) -> None:
    first = start(PROMPT, 1, options=CACHE_MANAGER)
    decoder = start(DECODER, 11, options=CACHE_MANAGER)
    wait_for_links(decoder, 1)
    assert first.call(cp.switch, DECODER) == PHASES
    wait_for_links(decoder)
    assert decoder.call(cp.switch, PROMPT, free_port()) == PHASES
    wait_for_links(first, 11)


# ---- from elsewhere


def test_an_order_from_elsewhere(start: Start, client: RegistryClient, free_port: FreePort) -> None:
    first, second = start(PROMPT, 1), start(DECODER, 11)
    wait_for_links(second, 1)
    assert client.switch_role(1, DECODER) == "its role is LLMRole.DECODER now"
    assert client.switch_role(1, DECODER) == "its role is LLMRole.DECODER already"
    assert client.switch_role(11, PROMPT, f"127.0.0.1:{free_port()}") == "its role is LLMRole.PROMPT now"
    wait_for_links(first, 11)
    with pytest.raises(LLMException, match="there is no cluster 77"):
        client.switch_role(77, PROMPT)
    with pytest.raises(LLMException, match="cluster 1: ") as caught:
        client.switch_role(1, PROMPT, "127.0.0.1:x")
    assert caught.value.status_code in (LLMStatusCode.LLM_PARAM_INVALID, LLMStatusCode.LLM_FAILED)
    assert first.call(cp.role_of) == "DECODER"
    wait_for_links(first, 11)


def test_an_order_for_one_that_dies(start: Start, client: RegistryClient) -> None:
    prompt = start(PROMPT, 1)
    prompt.stop()
    with pytest.raises(LLMException, match="cluster 1 is gone") as caught:
        client.switch_role(1, DECODER, timeout_s=20)
    assert caught.value.status_code is LLMStatusCode.LLM_FAILED
    prompt.kill()


@with_patience
def test_the_registry_dies_under_an_order(start: Start, registry: RegistryProcess, client: RegistryClient) -> None:
    member: Member = start(PROMPT, 1)
    decoder = start(DECODER, 11)
    wait_for_links(decoder, 1)
    held = decoder.start(hold_transfer, 1)
    wait_until(lambda: decoder.call(is_held))
    command = [sys.executable, "-m", "llm_datadist.tools.cli", "switch-role", "--registry", registry.address]
    with subprocess.Popen(
        [*command, "--cluster-id", "1", "--role", "decoder", "--timeout", "20"], stdout=subprocess.PIPE, text=True
    ) as ordering:
        wait_until(lambda: [one.state for one in client.members(role=PROMPT)] == ["draining"], 20)
        registry.kill()
        registry.start()
        decoder.call(let_go)
        held.result()
        said, _ = ordering.communicate(timeout=30)
    assert (ordering.returncode, said) == (0, "cluster 1: its role is LLMRole.DECODER now\n")
    assert member.call(cp.role_of) == "DECODER"


def test_members_that_do_not_exist_yet_are_no_obstacle(members: Members, registry: RegistryProcess) -> None:
    member = members("alone")
    member.call(cp.join, DECODER, 1, 1, registry.address, follow=False)
    started = time.monotonic()
    assert member.call(cp.switch, LLMRole.MIX) == PHASES
    assert time.monotonic() - started < 3
