"""Puts and gets: registration, binding, preparation, bounds, order, and what a lost peer or a fault does to them."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import time

import pytest

from tests.ascend_simulator.rank_process import (
    E_INTERNAL,
    E_NOT_SUPPORT,
    E_PARA,
    E_PTR,
    E_REMOTE,
    E_TIMEOUT,
    STREAM_SYNC_TIMEOUT,
    SUCCESS,
    SUSPECT_REMOTE,
    Rank,
    abort,
    asynchronous_error,
    buffer,
    connect,
    contents,
    counter,
    create_from_table,
    destroy,
    free,
    on,
    one_sided,
    peek,
    prepare,
    register,
    set_knob,
    synchronise,
    taken,
    text,
    together,
    with_comm,
    with_handle,
)

POOL = 8 << 20


def pattern(size: int) -> bytes:
    """Bytes in which a shift or a missing piece shows."""
    return bytes(range(251)) * (size // 251) + bytes(range(size % 251))


def table(port: int = 0) -> str:
    """Devices 0 and 1 of one server, or of two with a port."""
    devices = [{"device_id": str(n), "device_ip": f"127.0.0.{n + 1}", "rank_id": str(n)} for n in range(2)]
    if port:
        devices[0]["device_port"] = str(port)
        servers = [{"server_id": f"server {n}", "device": [devices[n]]} for n in range(2)]
    else:
        servers = [{"server_id": "server", "device": devices}]
    return json.dumps(
        {"version": "1.0", "status": "completed", "server_count": str(len(servers)), "server_list": servers}
    )


def bring_up(rank: Rank, size: int = POOL) -> int:
    """A registered and bound pool; gives its address."""
    address = rank.call(buffer, "pool", size)
    assert rank.call(register, "registration", address, size) == SUCCESS
    assert rank.call(with_comm, "HcclCommBindMem", "registration") == SUCCESS
    return address


def tear_down(*ranks: Rank) -> None:
    """The order of release."""
    for rank in ranks:
        assert rank.call(with_comm, "HcclCommUnbindMem", "registration") == SUCCESS
    for rank in ranks:
        assert rank.call(destroy) == SUCCESS
        assert rank.call(with_handle, "HcclDeregisterGlobalMem", "registration") == SUCCESS
        rank.call(free, "pool")
        rank.finish()


def start_pair(program, text_of_table: str, knobs: dict[str, object]) -> tuple[Rank, Rank]:
    """Two processes with a communicator; knobs of the initiator (rank 1) begin with own_."""
    general = {key: value for key, value in knobs.items() if not key.startswith("own_")}
    own = general | {key[4:]: value for key, value in knobs.items() if key.startswith("own_")}
    peer, initiator = Rank(program(HBM_MIB=256, **general), 0), Rank(program(HBM_MIB=256, **own), 1)
    for number, rank in enumerate((peer, initiator)):
        assert rank.call(create_from_table, text_of_table, number, name="one-sided") == SUCCESS, rank.call(text)
    return peer, initiator


@pytest.fixture(params=["hccs", "roce", "tcp"])
def wire(request, free_port):
    """Knobs and rank table of each way between two devices."""
    if request.param == "tcp":
        return {}, table(free_port())
    return ({"LINK": "roce"} if request.param == "roce" else {}), table()


@pytest.fixture
def pair(program):
    """Starts a prepared pair with a pool each: (peer, its pool's address, initiator, its pool's address)."""

    def start(way: tuple[dict[str, object], str] | None = None, **knobs: object) -> tuple[Rank, int, Rank, int]:
        more, text_of_table = way or ({}, table())
        peer, initiator = start_pair(program, text_of_table, {**more, **knobs})
        addresses = [bring_up(rank) for rank in (peer, initiator)]
        assert together([on(peer, prepare), on(initiator, prepare)]) == [SUCCESS] * 2
        return peer, addresses[0], initiator, addresses[1]

    return start


def fill(state, key, data):
    taken(state).write(state[key], data)


@pytest.mark.parametrize("size", [1, 65536, (2 << 20) + 3, POOL])
def test_gets_and_puts_arrive_equal(pair, wire, size):
    peer, there, initiator, here = pair(wire)
    peer.call(fill, "pool", pattern(size))
    assert initiator.call(one_sided, "Get", 0, [(here, there, size)]) == SUCCESS
    assert initiator.call(synchronise) == SUCCESS
    assert initiator.call(contents, "pool", size) == pattern(size)
    initiator.call(fill, "pool", pattern(size)[::-1])
    assert initiator.call(one_sided, "Put", 0, [(here, there, size)]) == SUCCESS
    assert initiator.call(synchronise) == SUCCESS
    assert peer.call(contents, "pool", size) == pattern(size)[::-1]
    tear_down(peer, initiator)


def test_the_peer_need_not_run(pair):
    peer, there, initiator, here = pair()
    peer.call(fill, "pool", pattern(POOL))
    os.kill(peer.pid, signal.SIGSTOP)
    try:
        assert initiator.call(one_sided, "Get", 0, [(here, there, POOL)]) == SUCCESS
        assert initiator.call(synchronise) == SUCCESS
    finally:
        os.kill(peer.pid, signal.SIGCONT)
    assert initiator.call(contents, "pool", POOL) == pattern(POOL)


@pytest.mark.parametrize("count", [0, 1, 256])
def test_many_descriptors(pair, wire, count):
    peer, there, initiator, here = pair(wire)
    peer.call(fill, "pool", pattern(256 * 1000))
    backwards = [(here + number * 1000, there + (count - 1 - number) * 1000, 1000) for number in range(count)]
    assert initiator.call(one_sided, "Get", 0, backwards) == SUCCESS
    assert initiator.call(synchronise) == SUCCESS
    data = pattern(256 * 1000)
    expected = b"".join(data[(count - 1 - number) * 1000 :][:1000] for number in range(count))
    assert initiator.call(contents, "pool", count * 1000 or 1)[: count * 1000] == expected
    tear_down(peer, initiator)


def test_more_than_256_descriptors(pair):
    _, there, initiator, here = pair()
    many = [(here + number, there + number, 1) for number in range(257)]
    assert initiator.call(one_sided, "Get", 0, many) == E_PARA
    assert "257" in initiator.call(text)


def test_ranges_outside_a_region(pair):
    peer, there, initiator, here = pair(MISUSE="error")
    initiator.call(fill, "pool", b"\0" * POOL)
    cases = [
        [(here, there + POOL - 99, 100)],
        [(here, there - 1, 100)],
        [(here, there + POOL, 1)],
        [(here + POOL - 99, there, 100)],
        [(here, there, 100), (here + 100, there + POOL, 1)],
        [(here, 4096, 100)],
    ]
    for case in cases:
        for kind in ("Get", "Put"):
            assert initiator.call(one_sided, kind, 0, case) == E_PARA
    assert initiator.call(counter, "misuse.out_of_bounds") == 2 * len(cases)
    assert initiator.call(synchronise) == SUCCESS
    assert initiator.call(contents, "pool", 200) == b"\0" * 200, "nothing has moved"
    tear_down(peer, initiator)


def test_other_arguments_that_are_refused(pair):
    _, there, initiator, here = pair(MISUSE="error")
    assert initiator.call(one_sided, "Get", 1, [(here, there, 1)]) == E_PARA
    assert initiator.call(one_sided, "Get", 2, [(here, there, 1)]) == E_PARA
    assert initiator.call(one_sided, "Get", 0, [(here, there, 0)]) == E_PARA
    assert initiator.call(one_sided, "Get", 0, [(0, there, 1)]) == E_PTR
    assert initiator.call(one_sided, "Get", 0, [(here, there, 100), (here + 99, there + 1000, 100)]) == E_PARA
    assert initiator.call(one_sided, "Put", 0, [(here, there, 100), (here + 1000, there + 99, 100)]) == E_PARA
    assert initiator.call(counter, "misuse.overlap_copy") == 2


def test_two_calls_stay_in_order_and_one_does_not(pair):
    peer, there, initiator, here = pair()
    flag = POOL - 64
    orders = set()
    for number in range(1, 150):
        initiator.call(put_and_flag, here, there, flag, number % 256)
        orders |= set(peer.call(watch, flag, number % 256))
    assert orders == {True}


def put_and_flag(state, here, there, flag, number):
    """Data of four descriptors with one call, the flag with the next."""
    taken(state).write(here, bytes([number]) * 4096)
    taken(state).write(here + flag, bytes([number]))
    parts = [(here + part * 1024, there + part * 1024, 1024) for part in range(4)]
    assert one_sided(state, "Put", 0, parts) == SUCCESS
    assert one_sided(state, "Put", 0, [(here + flag, there + flag, 1)]) == SUCCESS
    assert synchronise(state) == SUCCESS


def watch(state, flag, number):
    """Whether the data were there when the flag was seen."""
    device = taken(state)
    while device.peek(state["pool"] + flag, 1)[0] != number:
        pass
    return [device.peek(state["pool"], 4096) == bytes([number]) * 4096]


def test_descriptors_of_one_call_run_in_random_order(pair):
    peer, there, initiator, here = pair(own_FAULTS="exec.put=half", MISUSE="error")
    seen = set()
    for number in range(1, 9):
        peer.call(fill, "pool", b"\0" * 800)
        initiator.call(fill, "pool", bytes([number]) * 800)
        parts = [(here + part * 100, there + part * 100, 100) for part in range(8)]
        assert initiator.call(one_sided, "Put", 0, parts) == SUCCESS
        assert initiator.call(synchronise) == SUSPECT_REMOTE
        initiator.call(abort)
        arrived = peer.call(contents, "pool", 800)
        seen.add(tuple(part for part in range(8) if arrived[part * 100]))
    assert len(seen) > 1, "an order that never changes hides mistakes"
    assert all(len(parts) == 5 for parts in seen), "half of eight, and half of one"


# ---- registration and binding ----


def test_registering(program):
    rank = Rank(program(HBM_MIB=64, MISUSE="error"), 0)
    address = rank.call(buffer, "pool", 1 << 20)
    assert rank.call(register, "one", address, 1 << 19) == SUCCESS
    assert rank.call(register, "same", address, 1 << 19) == SUCCESS
    assert rank.call(same_handle, "one", "same")
    assert rank.call(register, "overlap", address + 4096, 1 << 19) == E_PARA
    assert "overlap" in rank.call(text)
    assert rank.call(register, "empty", address, 0) == E_PARA
    assert rank.call(register, "kind", address, 1 << 19, 2) == E_PARA
    assert rank.call(register, "host", address + (1 << 19), 4096, 1) == E_PARA
    assert rank.call(register, "outside", address, 1 << 26) == E_PARA
    assert rank.call(register, "behind", address + (1 << 19), 1 << 19) == SUCCESS
    for key in ("one", "behind"):
        assert rank.call(with_handle, "HcclDeregisterGlobalMem", key) == SUCCESS
    assert rank.call(with_handle, "HcclDeregisterGlobalMem", "same") == E_PARA
    assert [rank.call(counter, f"misuse.{name}") for name in ("wrong_kind", "out_of_bounds", "use_after_free")] == [
        1,
        1,
        1,
    ]
    rank.call(free, "pool")
    rank.finish()


def same_handle(state, one, other):
    return state[one] == state[other]


def test_registered_memory_that_is_freed(program):
    rank = Rank(program(HBM_MIB=64, MISUSE="error"), 0)
    address = rank.call(buffer, "pool", 1 << 20)
    assert rank.call(register, "one", address, 1 << 20) == SUCCESS
    rank.call(free, "pool")
    assert rank.call(with_handle, "HcclDeregisterGlobalMem", "one") == E_PARA
    assert rank.call(counter, "misuse.use_after_free") == 1


def test_a_registration_that_is_left_is_a_leak(program):
    rank = Rank(program(HBM_MIB=64), 0)
    address = rank.call(buffer, "pool", 1 << 20)
    assert rank.call(register, "one", address, 1 << 20) == SUCCESS
    assert "misuse leak" in rank.aborts(reset_only)


def reset_only(state):
    device = taken(state)
    device.must("aclrtFree", state["pool"])
    device.must("aclrtDestroyStream", device.stream)
    device.must("aclrtResetDevice", device.device)


def test_the_order_of_release(pair):
    peer, _, initiator, _ = pair(MISUSE="error")
    assert initiator.call(with_handle, "HcclDeregisterGlobalMem", "registration") == E_PARA
    assert initiator.call(destroy) == E_PARA
    assert "bound" in initiator.call(text)
    assert initiator.call(with_comm, "HcclCommBindMem", "registration") == E_PARA
    tear_down(peer, initiator)


def test_unbinding_what_is_not_bound(program):
    peer, initiator = start_pair(program, table(), {"MISUSE": "error"})
    address = initiator.call(buffer, "pool", 4096)
    assert initiator.call(register, "registration", address, 4096) == SUCCESS
    assert initiator.call(with_comm, "HcclCommUnbindMem", "registration") == E_PARA
    assert peer.call(destroy) == SUCCESS


def test_memory_that_is_bound_late(pair):
    peer, _there, initiator, here = pair(MISUSE="error")
    late = peer.call(buffer, "late", 4096)
    assert peer.call(register, "late", late, 4096) == SUCCESS
    assert peer.call(with_comm, "HcclCommBindMem", "late") == E_PARA
    assert peer.call(counter, "misuse.comm_late_bind") == 1
    peer.call(set_knob, "MISUSE", "log")
    assert peer.call(with_comm, "HcclCommBindMem", "late") == SUCCESS
    assert initiator.call(one_sided, "Get", 0, [(here, late, 64)]) == E_PARA, "no peer sees it"


def test_host_memory_goes_over_roce_only(program, wire):
    knobs, text_of_table = wire
    peer, initiator = start_pair(program, text_of_table, {**knobs, "MISUSE": "error"})
    there, here = bring_up(peer), bring_up(initiator)
    host = peer.call(bind_host_memory, b"host" * 25_000)
    assert together([on(peer, prepare), on(initiator, prepare)]) == [SUCCESS] * 2
    hccs = not knobs and "server 1" not in text_of_table
    code = initiator.call(one_sided, "Get", 0, [(here, host, 100_000)])
    assert code == (E_PARA if hccs else SUCCESS)
    assert initiator.call(synchronise) == SUCCESS
    if not hccs:
        assert initiator.call(contents, "pool", 100_000) == b"host" * 25_000
        own = initiator.call(bind_host_memory_late_is_refused)
        assert own == E_PARA
    assert initiator.call(one_sided, "Get", 0, [(here, there, 64)]) == SUCCESS
    assert initiator.call(synchronise) == SUCCESS


def bind_host_memory(state, data):
    """Pinned host memory with these bytes, registered and bound; gives its address."""
    device, address = taken(state), ctypes.c_void_p()
    device.must("aclrtMallocHost", ctypes.byref(address), len(data))
    ctypes.memmove(address.value, data, len(data))
    assert register(state, "host", address.value, len(data), 1) == SUCCESS
    assert with_comm(state, "HcclCommBindMem", "host") == SUCCESS
    return address.value


def bind_host_memory_late_is_refused(state):
    device, address = taken(state), ctypes.c_void_p()
    device.must("aclrtMallocHost", ctypes.byref(address), 4096)
    assert register(state, "host", address.value, 4096, 1) == SUCCESS
    return with_comm(state, "HcclCommBindMem", "host")


# ---- preparation ----


def test_preparing_without_the_peer_and_again(program):
    peer, initiator = start_pair(program, table(), {})
    for rank in (peer, initiator):
        bring_up(rank)
    for rank in (peer, initiator):
        began = time.monotonic()
        assert rank.call(prepare, 1) == E_TIMEOUT
        assert 0.9 < time.monotonic() - began < 4.0
    assert together([on(peer, prepare), on(initiator, prepare)]) == [SUCCESS] * 2
    assert initiator.call(prepare, 1) == SUCCESS, "a second one does nothing"
    tear_down(peer, initiator)


def test_destroying_ends_a_preparation(program):
    peer, initiator = start_pair(program, table(), {})
    stuck = initiator.begin(prepare, 20)
    assert not stuck.done()
    assert initiator.call(destroy) == SUCCESS
    assert stuck.result(1.0) == E_INTERNAL
    assert peer.call(destroy) == SUCCESS


def test_preparations_that_are_refused(program):
    peer, initiator = start_pair(program, table(), {"HCCS": "none", "MISUSE": "error"})
    assert initiator.call(prepare, 0) == E_PARA
    assert initiator.call(prepare, -1) == E_PARA
    assert initiator.call(prepare, 1) == E_NOT_SUPPORT
    address = bring_up(initiator)
    assert initiator.call(one_sided, "Get", 0, [(address, address, 1)]) == E_PARA
    assert "not prepared" in initiator.call(text)
    assert peer.call(destroy) == SUCCESS


def test_a_communicator_of_root_information_serves_too(program):
    peer, initiator = (Rank(program(HBM_MIB=64), device) for device in (0, 1))
    connect(peer, initiator)
    there, here = bring_up(peer), bring_up(initiator)
    assert together([on(peer, prepare), on(initiator, prepare)]) == [SUCCESS] * 2
    assert initiator.call(one_sided, "Put", 0, [(here, there, POOL)]) == SUCCESS
    assert initiator.call(synchronise) == SUCCESS
    tear_down(peer, initiator)


# ---- failures ----


def test_a_peer_that_is_gone(pair, wire):
    peer, there, initiator, here = pair(wire)
    began = time.monotonic()
    peer.program.kill()
    assert initiator.call(one_sided, "Get", 0, [(here, there, POOL)]) == SUCCESS
    assert initiator.call(synchronise) == SUSPECT_REMOTE
    roce = wire[0] or "server 1" in wire[1]
    assert initiator.call(asynchronous_error) == (E_REMOTE if roce else SUCCESS)
    assert not roce or time.monotonic() - began > 0.25, "the network tries again for a while"
    initiator.call(abort)
    tear_down(initiator)


def test_another_code_for_a_peer_that_is_gone(pair):
    peer, there, initiator, here = pair(DEAD_PEER_CODE=507053)
    assert peer.call(with_comm, "HcclCommUnbindMem", "registration") == SUCCESS
    assert peer.call(destroy) == SUCCESS, "by choice counts as gone"
    assert initiator.call(one_sided, "Put", 0, [(here, there, 64)]) == SUCCESS
    assert initiator.call(synchronise) == 507053


def test_a_peer_that_dies_during_a_get(pair, wire):
    peer, there, initiator, here = pair(wire, PIECE_KIB=4)
    peer.call(fill, "pool", b"\1" * POOL)
    initiator.call(fill, "pool", b"\0" * POOL)
    assert initiator.call(get_again_and_again, here, there) == SUCCESS
    while initiator.call(peek, "pool", 1) != b"\1":
        pass
    peer.program.kill()
    assert initiator.call(synchronise) == SUSPECT_REMOTE
    initiator.call(abort)
    tear_down(initiator)


def get_again_and_again(state, here, there):
    return max(one_sided(state, "Get", 0, [(here, there, POOL)]) for _ in range(50))


def test_an_abort_ends_a_get_and_nothing_is_written_after_it(pair, wire):
    peer, there, initiator, here = pair(wire, PIECE_KIB=4)
    peer.call(fill, "pool", b"\1" * POOL)
    initiator.call(fill, "pool", b"\0" * POOL)
    assert initiator.call(abort_during_gets, here, there)
    assert initiator.call(one_sided, "Get", 0, [(here, there, POOL)]) == SUCCESS
    assert initiator.call(synchronise) == SUCCESS, "a new stream works"
    assert initiator.call(contents, "pool", POOL) == b"\1" * POOL
    tear_down(peer, initiator)


def abort_during_gets(state, here, there):
    device = taken(state)
    assert get_again_and_again(state, here, there) == SUCCESS
    while device.peek(here, 1) != b"\1":
        pass
    abort(state)
    device.write(here, b"\2" * POOL)
    return device.peek(here, POOL) == b"\2" * POOL


@pytest.mark.parametrize("kind", ["Get", "Put"])
@pytest.mark.parametrize(
    ("action", "code", "right"),
    [
        ("drop", SUCCESS, False),
        ("corrupt", SUCCESS, False),
        ("delay(30)", SUCCESS, True),
        ("async(21)", SUCCESS, True),
        ("code(507999)", 507999, False),
        ("half", SUSPECT_REMOTE, False),
        ("hang", STREAM_SYNC_TIMEOUT, False),
        ("eof", SUSPECT_REMOTE, False),
    ],
)
def test_faults_of_the_execution(pair, wire, kind, action, code, right):
    where = f"exec.{kind.lower()}"
    peer, there, initiator, here = pair(wire, own_FAULTS=f"{where}#1={action}")
    source, target = (peer, initiator) if kind == "Get" else (initiator, peer)
    data = pattern(600_000)
    source.call(fill, "pool", data)
    target.call(fill, "pool", b"\xff" * len(data))
    assert initiator.call(one_sided, kind, 0, [(here, there, len(data))]) == SUCCESS
    assert initiator.call(synchronise, 400 if code == STREAM_SYNC_TIMEOUT else 20_000) == code
    arrived = target.call(peek, "pool", len(data))
    assert (arrived == data) == right
    if action == "half":
        assert arrived == data[:300_000] + b"\xff" * 300_000
    if action == "corrupt":
        assert sum(a != b for a, b in zip(arrived, data)) == 1
    if action == "async(21)":
        assert initiator.call(asynchronous_error) == 21
    assert initiator.call(counter, f"fault.{where}") == 1
    initiator.call(abort)
    tear_down(peer, initiator)


@pytest.mark.parametrize("kind", ["Get", "Put"])
def test_a_process_that_kills_itself(pair, kind):
    peer, there, initiator, here = pair(own_FAULTS=f"exec.{kind.lower()}=kill")
    initiator.aborts(transfer_and_wait, kind, here, there, by=signal.SIGKILL)
    tear_down(peer)


def transfer_and_wait(state, kind, here, there):
    return one_sided(state, kind, 0, [(here, there, POOL)]), synchronise(state)


def test_two_streams(pair):
    _, there, initiator, here = pair(own_FAULTS="exec.get=hang", MISUSE="error")
    assert initiator.call(get_on_two_streams, here, there) == [SUCCESS, E_PARA]
    assert initiator.call(counter, "misuse.comm_two_streams") == 1


def get_on_two_streams(state, here, there):
    device = taken(state)
    first = one_sided(state, "Get", 0, [(here, there, 64)])
    kept, device.stream = device.stream, device.new_stream()
    second = one_sided(state, "Get", 0, [(here + 64, there, 64)])
    device.must("aclrtDestroyStream", device.stream)
    device.stream = kept
    return [first, second]


def test_unbinding_under_a_get(pair):
    _, there, initiator, here = pair(own_FAULTS="exec.get=hang", MISUSE="error")
    assert initiator.call(one_sided, "Get", 0, [(here, there, 64)]) == SUCCESS
    assert initiator.call(with_comm, "HcclCommUnbindMem", "registration") == E_PARA
    assert initiator.call(counter, "misuse.comm_busy_destroy") == 1


def test_a_name_is_used_again_and_again(program):
    peer, initiator = (Rank(program(HBM_MIB=64), device) for device in (0, 1))
    for _ in range(30):
        calls = [
            on(rank, create_from_table, table(), number, name="again") for number, rank in enumerate((peer, initiator))
        ]
        assert together(calls) == [SUCCESS] * 2
        assert together([on(peer, prepare), on(initiator, prepare)]) == [SUCCESS] * 2
        assert together([on(peer, destroy), on(initiator, destroy)]) == [SUCCESS] * 2
    for rank in (peer, initiator):
        rank.finish()
