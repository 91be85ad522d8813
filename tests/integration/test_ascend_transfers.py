"""Pulls and pushes between two devices over HCCL, byte by byte; the host cannot look into the devices' memory."""

from __future__ import annotations

import random
import time
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

from llm_datadist import LLMStatusCode, Placement
from llm_datadist.engine.device_choice import VARIABLE
from tests import ascend_member as am
from tests.ascend_member import MIB, Plan, Shape
from tests.free_ports import free_ports
from tests.processes import Member
from tests.simulated_devices import DeviceMembers
from tests.warm_group import process_group

OK = LLMStatusCode.LLM_SUCCESS
DEVICE, HOST = Placement.DEVICE, Placement.HOST
POOL, HOST_POOL = 80 * MIB, 24 * MIB
FIRST, SECOND = 1, 2  # cluster ids, and models of their caches


class Two(NamedTuple):
    """Two linked processes."""

    one: Member
    other: Member


@pytest.fixture(scope="module")
def two() -> Iterator[Two]:
    with process_group() as group, free_ports() as free_port:
        ports = [free_port(), free_port()]
        start = DeviceMembers(group, 0, {VARIABLE: "simulator"})
        made = Two(start("one"), start("other"))
        for cluster_id, member, port in zip((FIRST, SECOND), made, ports):
            member.call(am.open_instance, cluster_id, port, POOL, HOST_POOL)
        assert made.one.call(am.link, (SECOND, ports[1])) == [OK]
        yield made
        for member in made:
            member.call(am.close_instance)


class Caches:
    """A cache of each process, and what must be in them."""

    def __init__(
        self, two: Two, shape: Shape, other_shape: Shape, placements: tuple[Placement, Placement], seed: int
    ) -> None:
        self.two = two
        self.contents = [shape.content(seed), other_shape.content(seed + 1)]
        self.ids = [
            two.one.call(am.allocate, shape, seed, placements[0], FIRST),
            two.other.call(am.allocate, other_shape, seed + 1, placements[1], SECOND),
        ]

    def pull(self, *plans: Plan) -> None:
        for plan in plans:
            plan.apply(self.contents[1], self.contents[0])
        assert self.two.one.call(am.pull_many, SECOND, SECOND, self.ids[0], plans) == {OK}

    def push(self, *plans: Plan) -> None:
        for plan in plans:
            plan.apply(self.contents[0], self.contents[1])
        assert self.two.one.call(am.push_many, SECOND, SECOND, self.ids[0], plans) == {OK}

    def wrong_bytes(self) -> int:
        pairs = zip(self.two, self.ids, self.contents)
        return sum(int((member.call(am.content_of, each) != wanted).sum()) for member, each, wanted in pairs)

    def check(self) -> None:
        assert self.wrong_bytes() == 0

    def close(self) -> None:
        for member, each in zip(self.two, self.ids):
            member.call(am.deallocate, each)


@pytest.fixture
def caches(two: Two) -> Iterator[Callable[..., Caches]]:
    made: list[Caches] = []

    def allocate(
        shape: Shape,
        other: Shape | None = None,
        placements: tuple[Placement, Placement] = (DEVICE, DEVICE),
        seed: int = 1,
    ) -> Caches:
        made.append(Caches(two, shape, other or shape, placements, seed))
        return made[-1]

    yield allocate
    for each in made:
        each.close()


def random_plans(choice: random.Random, source: Shape, target: Shape, count: int) -> Iterator[Plan]:
    """Plans with neighbours and without, over some of the tensors."""
    for _ in range(count):
        tensors = choice.randint(1, min(source.tensors, target.tensors))
        come, go = choice.randint(0, source.tensors - tensors), choice.randint(0, target.tensors - tensors)
        many = choice.randint(1, min(source.blocks, target.blocks))
        into = choice.sample(range(target.blocks), many)
        if choice.random() < 0.3:
            into.sort()
        out_of = [choice.randrange(source.blocks) for _ in into]
        if choice.random() < 0.5:
            first = choice.randint(0, source.blocks - many)
            out_of = list(range(first, first + many))
        yield Plan(range(come, come + tensors), range(go, go + tensors), out_of, into)


# 40 and 1000 are no multiples of 64; from a MiB on blocks are not gathered; a step has 4 MiB.
SMALL = [(3, 24, 40), (2, 30, 1000), (4, 16, 4096), (3, 50, 65536)]
LARGE = [(2, 5, MIB - 7), (2, 5, MIB), (2, 4, MIB + 192), (1, 4, 3 * MIB + 5), (1, 3, 5 * MIB)]


@pytest.mark.parametrize("placements", [(DEVICE, DEVICE), (DEVICE, HOST), (HOST, DEVICE), (HOST, HOST)], ids=str)
@pytest.mark.parametrize("dimensions", SMALL, ids=str)
def test_random_plans(
    caches: Callable[..., Caches], dimensions: tuple[int, int, int], placements: tuple[Placement, Placement]
) -> None:
    choice = random.Random(repr(dimensions))
    shape = Shape(*dimensions)
    other = Shape(shape.tensors + 1, shape.blocks + 3, shape.nbytes)
    pair = caches(shape, other, placements)
    for _ in range(3):
        pair.pull(*random_plans(choice, other, shape, 5))
        pair.push(*random_plans(choice, shape, other, 5))
        pair.check()


@pytest.mark.parametrize("placements", [(DEVICE, DEVICE), (DEVICE, HOST), (HOST, DEVICE)], ids=str)
@pytest.mark.parametrize("dimensions", LARGE, ids=str)
def test_random_plans_of_large_blocks(
    caches: Callable[..., Caches], dimensions: tuple[int, int, int], placements: tuple[Placement, Placement]
) -> None:
    choice = random.Random(repr(dimensions))
    shape = Shape(*dimensions)
    pair = caches(shape, None, placements)
    pair.pull(*random_plans(choice, shape, shape, 3))
    pair.push(*random_plans(choice, shape, shape, 3))
    pair.check()


@pytest.mark.parametrize("nbytes", [1, 64 << 10, 2 * MIB + 3, 64 * MIB])
def test_a_whole_cache_of_any_size(two: Two, nbytes: int) -> None:
    shape = Shape(2 if nbytes < MIB else 1, 1, nbytes)
    there = two.other.call(am.allocate, shape, 5, plain=True)
    for seed, move, at, moved in ((6, am.pull_slot, "one", 5), (9, am.push_slot, "other", 9)):
        mine = two.one.call(am.allocate, shape, seed, plain=True)
        assert two.one.call(move, SECOND, there, mine) is OK
        place = mine if at == "one" else there
        assert (getattr(two, at).call(am.content_of, place) == shape.content(moved)).all()
        two.one.call(am.deallocate, mine)
    two.other.call(am.deallocate, there)


@pytest.mark.parametrize("size", [1, 63, 64, 65, 4095, 4097])
def test_a_part_of_a_cache(two: Two, size: int) -> None:
    """What is moved of each tensor ends where no copy of a device may end."""
    shape = Shape(3, 1, 5000)
    there = two.other.call(am.allocate, shape, 5, plain=True)
    mine = two.one.call(am.allocate, shape, 6, plain=True)
    wanted = shape.content(6)
    wanted[:, :, :size] = shape.content(5)[:, :, :size]
    assert two.one.call(am.pull_slot, SECOND, there, mine, size) is OK
    assert (two.one.call(am.content_of, mine) == wanted).all()
    two.one.call(am.deallocate, mine)
    two.other.call(am.deallocate, there)


def test_a_thousand_scattered_blocks(two: Two, caches: Callable[..., Caches]) -> None:
    """They go in few operations, and neighbours are copied as one."""
    shape = Shape(1, 2000, 4096)
    pair = caches(shape)
    evens, pairs = [2 * number for number in range(1000)], [4 * (n // 2) + n % 2 for n in range(1000)]
    before = {name: two.one.call(am.counter, f"calls.{name}") for name in ("HcclBatchSendRecv", "aclrtMemcpyAsync")}
    pair.pull(Plan(range(1), range(1), evens, pairs))
    pair.check()
    done = {name: two.one.call(am.counter, f"calls.{name}") - count for name, count in before.items()}
    assert done["HcclBatchSendRecv"] == 1
    assert done["aclrtMemcpyAsync"] < 520  # 500 pairs of neighbours, and what `check` copies


def test_layers_go_out_while_they_are_computed(two: Two, caches: Callable[..., Caches]) -> None:
    shape = Shape(6, 10, 3000)
    pair = caches(shape)
    plan = Plan(range(6), range(6), [0, 3, 4, 9], [8, 2, 1, 5])
    assert two.one.call(am.push_layers, SECOND, SECOND, pair.ids[0], shape, 77, plan) == [OK]
    pair.contents[0] = shape.content(77)
    plan.apply(*pair.contents)
    pair.check()


def test_a_refusal_leaves_the_link_good(two: Two, caches: Callable[..., Caches]) -> None:
    """Nothing is posted for it."""
    shape = Shape(2, 8, 4096)
    pair = caches(shape)
    plan = Plan(range(2), range(2), [1, 3, 5], [0, 2, 4])
    pair.pull(plan)
    before = two.one.call(am.counter, "calls.HcclBatchSendRecv"), two.one.call(am.counter, "calls.HcclGetRootInfo")
    assert two.one.call(am.pull_blocks, SECOND, 99, pair.ids[0], plan) is LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
    outside = plan._replace(source=[1, 3, 8])
    assert two.one.call(am.pull_blocks, SECOND, SECOND, pair.ids[0], outside) is LLMStatusCode.LLM_PARAM_INVALID
    assert two.one.call(am.push_blocks, SECOND, 99, pair.ids[0], plan) is LLMStatusCode.LLM_KV_CACHE_NOT_EXIST
    after = two.one.call(am.counter, "calls.HcclBatchSendRecv"), two.one.call(am.counter, "calls.HcclGetRootInfo")
    assert after == before
    pair.push(plan)
    pair.check()


@pytest.mark.parametrize("theirs", [am.pull_many, am.push_many])
def test_both_ends_begin_at_the_same_moment(two: Two, theirs: Callable[..., object]) -> None:
    """Each of the two has a cache that it pulls into and one that is pulled from, so the bytes are certain."""
    shape = Shape(2, 16, 5000)
    whole = Plan(range(2), range(2), list(range(16)), list(reversed(range(16))))
    source = [member.call(am.allocate, shape, 30 + i, DEVICE, 30) for i, member in enumerate(two)]
    target = [member.call(am.allocate, shape, 40 + i, DEVICE, 40) for i, member in enumerate(two)]
    forth = two.one.start(am.pull_many, SECOND, 30, target[0], [whole] * 20)
    if theirs is am.pull_many:
        back = two.other.start(am.pull_many, FIRST, 30, target[1], [whole] * 20)
        arrived = two.other, target[1], shape.content(30)
    else:
        free = two.one.call(am.allocate, shape, 50, DEVICE, 50)
        back = two.other.start(am.push_many, FIRST, 50, source[1], [whole] * 20)
        arrived = two.one, free, shape.content(31)
    assert forth.result() == back.result() == {OK}
    assert (two.one.call(am.content_of, target[0]) == shape.content(31)[:, ::-1]).all()
    member, cache, wanted = arrived
    assert (member.call(am.content_of, cache) == wanted[:, ::-1]).all()
    if theirs is am.push_many:
        two.one.call(am.deallocate, free)
    for member, *both in zip(two, source, target):
        for cache in both:
            member.call(am.deallocate, cache)


def test_the_owner_computes_in_python(two: Two, caches: Callable[..., Caches]) -> None:
    pair = caches(Shape(2, 20, 4096))
    held = two.other.start(am.hold_the_interpreter, 2.0)
    began = time.monotonic()
    pair.pull(*[Plan(range(2), range(2), list(range(20)), list(range(20)))] * 10)
    assert time.monotonic() - began < 1.5
    assert not held.done()
    held.result()
    pair.check()


@pytest.mark.parametrize(
    ("nbytes", "fault"),
    [(size, f"exec.send#1={action}") for size in (4096, 2 * MIB + 64) for action in ("drop", "corrupt")]
    + [(4096, f"exec.copy#3={action}") for action in ("drop", "corrupt")],  # large blocks are not copied
)
def test_bytes_that_are_lost_or_damaged_are_noticed(
    two: Two, caches: Callable[..., Caches], nbytes: int, fault: str
) -> None:
    """If they were not, the tests of this module would show nothing."""
    # Contents of its own: what a dropped copy leaves in a buffer must not be what it would have brought.
    pair = caches(Shape(1, 8, nbytes), seed=zlib.crc32(fault.encode()) % 10000 + nbytes)
    plan = Plan(range(1), range(1), [0, 2, 4, 6], [1, 3, 5, 7])
    two.other.call(am.set_faults, fault)
    try:
        pair.pull(plan)
    finally:
        two.other.call(am.set_faults, "")
    assert two.other.call(am.counter, f"fault.{fault.partition('#')[0]}") > 0
    assert pair.wrong_bytes() > 0
    pair.pull(plan)
    pair.check()
