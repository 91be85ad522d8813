"""Links over HCCL between simulated devices: how many there may be, what they take, and that they give it back."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from llm_datadist import LLMStatusCode
from llm_datadist.engine.device_choice import VARIABLE
from tests import ascend_member as am
from tests import many_engines
from tests.ascend_member import MIB, Plan, Shape
from tests.processes import Member
from tests.simulated_devices import DeviceMembers
from tests.warm_group import process_group

OK = LLMStatusCode.LLM_SUCCESS
ALREADY = LLMStatusCode.LLM_ALREADY_LINK
SHAPE = Shape(2, 16, 1000)
WHOLE = Plan(range(2), range(2), list(range(16)), list(reversed(range(16))))
BUFFER, STAGING = 2 * 4 * MIB, 8 * MIB  # of a link, and for its scattered transfers
ROUNDS = 20


@pytest.fixture
def devices() -> Iterator[DeviceMembers]:
    """Start processes with a device each."""
    with process_group() as group:
        yield DeviceMembers(group, 0, {VARIABLE: "simulator"})


def open_all(devices: DeviceMembers, free_port: Callable[[], int], count: int) -> list[tuple[Member, int, int]]:
    """Start processes with an instance each; gives them with cluster ids and ports."""
    made = [(devices(f"cluster {number}"), number, free_port()) for number in range(1, count + 1)]
    for call in [member.start(am.open_instance, number, port) for member, number, port in made]:
        call.result()
    return made


def test_linking_and_unlinking_again_and_again(devices: DeviceMembers, free_port: Callable[[], int]) -> None:
    """Both ends begin with the first transfer of a link at the same moment, and with it take what it needs."""
    (one, first, _), (other, second, port) = open_all(devices, free_port, 2)
    sources = [member.call(am.allocate, SHAPE, seed, model=1) for member, seed in ((one, 10), (other, 11))]
    targets = [member.call(am.allocate, SHAPE, 12) for member in (one, other)]
    begin = [member.call(am.free_memory) for member in (one, other)]
    for number in range(ROUNDS):
        assert one.call(am.link, (second, port)) == [OK]
        if number == 0:
            taken = [before - member.call(am.free_memory) for before, member in zip(begin, (one, other))]
            assert all(nbytes <= BUFFER + STAGING for nbytes in taken)
        calls = [
            one.start(am.pull_blocks, second, 1, targets[0], WHOLE),
            other.start(am.pull_blocks, first, 1, targets[1], WHOLE),
        ]
        assert [call.result() for call in calls] == [OK, OK]
        if number == 0:
            taken = [before - member.call(am.free_memory) for before, member in zip(begin, (one, other))]
            assert all(nbytes <= BUFFER + STAGING for nbytes in taken)
        assert one.call(am.unlink, (second, port)) == [OK]
        for member in (one, other):
            member.call(am.wait_until_free, min(begin))
        if number == 0:
            settled = [member.call(am.holdings) for member in (one, other)]
    assert all(member.call(am.claim_pages) <= 1 for member in (one, other)), "links pile up until a cache is freed"
    assert [member.call(am.holdings_like, had) for member, had in zip((one, other), settled)] == settled
    assert (one.call(am.content_of, targets[0]) == SHAPE.content(11)[:, ::-1]).all()
    assert (other.call(am.content_of, targets[1]) == SHAPE.content(10)[:, ::-1]).all()
    assert sources[0] != targets[0]
    for member in (one, other):
        member.call(am.close_instance)


def test_a_ring_of_three(devices: DeviceMembers, free_port: Callable[[], int]) -> None:
    """Each links to the next at the same moment, and then pulls from it, all at once."""
    ring = open_all(devices, free_port, 3)
    after = [*ring[1:], ring[0]]
    linking = [member.start(am.link, (number, port)) for (member, _, _), (_, number, port) in zip(ring, after)]
    assert [call.result() for call in linking] == [[OK]] * 3
    targets = []
    for member, number, _ in ring:
        member.call(am.allocate, SHAPE, number, model=1)
        targets.append(member.call(am.allocate, SHAPE, 9))
    pulling = [
        member.start(am.pull_many, number, 1, target, [WHOLE] * 20)
        for (member, _, _), (_, number, _), target in zip(ring, after, targets)
    ]
    assert [call.result() for call in pulling] == [{OK}] * 3
    for (member, _, _), (_, number, _), target in zip(ring, after, targets):
        assert (member.call(am.content_of, target) == SHAPE.content(number)[:, ::-1]).all()
    for member, _, _ in ring:
        member.call(am.close_instance)


def test_sixteen_links_at_the_same_time(devices: DeviceMembers) -> None:
    prompts, decoders = devices("prompt"), devices("decoders")
    numbers = list(range(100, 116))
    (port,) = prompts.call(many_engines.open_prompts, [1])
    decoders.call(many_engines.open_decoders, numbers)
    linked = decoders.call(many_engines.link_from_each, numbers, 1, port)
    assert linked == [(OK, [OK])] * 16
    assert prompts.call(many_engines.states_of_links, 1) == ["LINKED"] * 16
    for member in (decoders, prompts):
        member.call(many_engines.close_engines)


def test_two_links_between_the_same_processes(devices: DeviceMembers) -> None:
    prompts, decoders = devices("prompts"), devices("decoders")
    ports = prompts.call(many_engines.open_prompts, [1, 2])
    decoders.call(many_engines.open_decoders, [3, 4])
    for number, target in ((3, (1, ports[0])), (4, (2, ports[1]))):
        assert decoders.call(many_engines.link_to_all, number, [target]) == (OK, [OK])
    assert [decoders.call(many_engines.states_of_links, number) for number in (3, 4)] == [["LINKED"]] * 2
    for member in (decoders, prompts):
        member.call(many_engines.close_engines)
