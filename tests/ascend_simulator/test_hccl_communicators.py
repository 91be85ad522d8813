"""Communicators: root information, what is checked, what is counted, how they end."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from tests.ascend_simulator.rank_process import (
    E_INTERNAL,
    E_MEMORY,
    E_PARA,
    E_RUNTIME,
    E_TIMEOUT,
    MIB,
    SUCCESS,
    Rank,
    abort,
    asynchronous_error,
    buffer,
    connect,
    contents,
    counter,
    create,
    destroy,
    disconnect,
    finalize,
    free,
    free_memory,
    identity,
    on,
    post,
    root_info,
    synchronise,
    text,
    together,
)


@pytest.fixture
def rank(program):
    """Starts processes with a device."""
    return lambda device=0, **knobs: Rank(program(HBM_MIB=256, **knobs), device)


def test_root_information_makes_a_communicator(rank):
    root, other = rank(0), rank(1)
    info = root.call(root_info)
    assert len(info) == 4108
    assert info.rstrip(b"\0") != info
    assert together([on(root, create, info, 0, name="pair"), on(other, create, info, 1, name="pair")]) == [SUCCESS] * 2
    assert root.call(identity) == (2, 0, "pair")
    assert other.call(identity) == (2, 1, "pair")
    assert root.call(asynchronous_error) == 0
    disconnect(root, other)


def test_eight_ranks_meet_in_a_barrier(rank):
    ranks = [rank(device) for device in range(8)]
    connect(*ranks)
    assert together([on(each, barrier_and_wait) for each in ranks]) == [(SUCCESS, SUCCESS)] * 8
    disconnect(*ranks)


def barrier_and_wait(state):
    device = state["device"]
    device.enter()
    return device.call("HcclBarrier", state["comm"], device.stream), device.synchronise()


@pytest.mark.parametrize(
    ("mine", "theirs", "reason"),
    [
        ({"name": "a"}, {"name": "b"}, "names differ"),
        ({"rank": 0}, {"rank": 0}, "same rank"),
        ({"ranks": 2}, {"ranks": 3}, "numbers of ranks differ"),
        ({"buffer_mib": 1}, {"buffer_mib": 2}, "buffer sizes differ"),
    ],
)
def test_ranks_that_do_not_fit_are_refused_at_both_ends(rank, mine, theirs, reason):
    root, other = rank(0), rank(1)
    info = root.call(root_info)
    calls = [on(root, create, info, **{"rank": 0, **mine}), on(other, create, info, **{"rank": 1, **theirs})]
    assert together(calls) == [E_PARA] * 2
    assert reason in root.call(text)
    assert reason in other.call(text)
    root.finish()
    other.finish()


def test_two_ranks_on_one_device_are_refused(rank):
    root, other = rank(0), rank(0)
    info = root.call(root_info)
    assert together([on(root, create, info, 0), on(other, create, info, 1)]) == [E_PARA] * 2
    assert "same device" in other.call(text)


def test_a_partner_that_never_comes(rank):
    root = rank(0, TIME_SCALE="0.002")
    info = root.call(root_info)
    assert root.call(create, info, 0) == E_TIMEOUT
    other = rank(1, TIME_SCALE="0.002")
    assert other.call(create, info, 1) == E_TIMEOUT, "the root has closed"
    root.finish()


def test_root_information_serves_once(rank):
    root, other, third = rank(0, TIME_SCALE="0.002"), rank(1), rank(2, TIME_SCALE="0.002")
    info = root.call(root_info)
    assert together([on(root, create, info, 0), on(other, create, info, 1)]) == [SUCCESS] * 2
    assert third.call(create, info, 1) == E_TIMEOUT
    disconnect(root, other)


def test_bytes_that_are_no_root_information(rank):
    root = rank(0)
    info = bytearray(root.call(root_info))
    assert root.call(create, bytes(4108), 0) == E_PARA
    info[-1] = 1
    assert root.call(create, bytes(info), 0) == E_PARA
    assert "end of the root information" in root.call(text)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"magic": 0x0F0F0F0F}, "magic"),
        ({"name": "n" * 128}, "no end"),
        ({"buffer_mib": 0}, "buffer size"),
        ({"size": 200}, "too small"),
        ({"size": 8}, "smaller than its head"),
        ({"version": 99}, "version"),
    ],
)
def test_configurations_that_are_refused(rank, fields, reason):
    root = rank(0)
    assert root.call(create, root.call(root_info), 0, **fields) == E_PARA
    assert reason in root.call(text)


def test_buffers_are_charged_twice_and_given_back(rank):
    root, other = rank(0), rank(1)
    before = root.call(free_memory)
    connect(root, other, buffer_mib=16)
    assert before - root.call(free_memory) == 32 * MIB
    assert root.call(destroy) == SUCCESS
    assert root.call(free_memory) == before
    info = root.call(root_info)
    assert root.call(create, info, 0, buffer_mib=200) == E_MEMORY
    assert root.call(free_memory) == before
    assert "207001" in root.call(text)
    root.finish()


def test_a_hundred_communicators_one_after_the_other(rank):
    root, other = rank(0), rank(1)
    before = root.call(descriptors), root.call(free_memory)
    for _ in range(100):
        connect(root, other, name="again")
        assert together([on(root, destroy), on(other, destroy)]) == [SUCCESS] * 2
    assert (root.call(descriptors), root.call(free_memory)) == before
    assert root.call(counter, "live.communicators") == 0


def descriptors(state):
    return len(list(Path("/proc/self/fd").iterdir())), len(list(Path("/proc/self/task").iterdir()))


def test_two_communicators_of_the_same_processes(rank):
    root, other = rank(0), rank(1)
    for name in ("one", "two"):
        connect(root, other, name=name, key=name)
    data = {"one": b"1" * 1000, "two": b"2" * 1000}
    for name in data:
        root.call(buffer, "from " + name, data[name])
        other.call(buffer, "to " + name, 1000)
        calls = [
            on(root, post, "Send", "from " + name, 1000, 1, comm=name),
            on(other, post, "Recv", "to " + name, 1000, 0, comm=name),
        ]
        assert together(calls) == [SUCCESS] * 2
        assert together([on(root, synchronise), on(other, synchronise)]) == [SUCCESS] * 2
    assert {name: other.call(contents, "to " + name, 1000) for name in data} == data
    for each, prefix in ((root, "from "), (other, "to ")):
        each.call(free, prefix + "one", prefix + "two")
        assert each.call(destroy, "one") == SUCCESS
    disconnect(root, other, key="two")


def test_destroying_ends_a_first_operation_that_is_stuck(rank):
    root, other = rank(0), rank(1)
    connect(root, other)
    root.call(buffer, "data", 1000)
    stuck = root.begin(post, "Send", "data", 1000, 1)
    other.call(identity)
    assert not stuck.done()
    assert root.call(destroy) == SUCCESS
    assert stuck.result(1.0) == E_INTERNAL
    root.call(free, "data")
    root.finish()
    assert other.call(destroy) == SUCCESS


def test_destroying_twice_and_nothing(rank):
    root, other = rank(0, MISUSE="error"), rank(1)
    connect(root, other)
    assert root.call(destroy_null) == SUCCESS
    assert [root.call(destroy), root.call(destroy)] == [SUCCESS, E_PARA]
    assert root.call(counter, "misuse.use_after_free") == 1


def destroy_null(state):
    state["device"].enter()
    return state["device"].call("HcclCommDestroy", None)


def test_a_name_in_use(rank):
    root, other = rank(0, MISUSE="error"), rank(1, MISUSE="error")
    connect(root, other, name="taken")
    info = root.call(root_info)
    assert root.call(create, info, 0, name="taken", key="second") == E_PARA
    assert root.call(counter, "misuse.comm_duplicate_name") == 1
    disconnect(root, other)


def create_in_two_threads(state):
    info = root_info(state)
    codes = []
    threads = [threading.Thread(target=lambda: codes.append(create(state, info, 0))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sorted(codes)


def test_two_threads_of_a_device_in_a_creation(rank):
    root = rank(0, TIME_SCALE="0.005", MISUSE="error")
    assert root.call(create_in_two_threads) == [E_PARA, E_TIMEOUT]
    assert root.call(counter, "misuse.comm_thread") == 1


def create_without_device(state):
    info = root_info(state)
    codes = []
    device = state["device"]
    thread = threading.Thread(target=lambda: codes.append(device.call("HcclCommInitRootInfo", 2, info, 0, bytes(8))))
    thread.start()
    thread.join()
    return codes[0]


def test_a_creation_without_device(rank):
    root = rank(0, MISUSE="error")
    assert root.call(create_without_device) == E_RUNTIME
    assert root.call(counter, "misuse.comm_thread") == 1


def create_on_another_device(state):
    info = root_info(state)
    device = state["device"]
    device.must("aclrtSetDevice", 1)
    return device.call("HcclCommInitRootInfo", 2, info, 0, bytes(8))


def test_a_creation_on_another_device_than_the_root_information(rank):
    root = rank(0, MISUSE="error")
    assert root.call(create_on_another_device) == E_PARA
    assert root.call(counter, "misuse.comm_thread") == 1


def test_a_communicator_that_is_left_alive_is_a_leak(rank):
    root, other = rank(0, MISUSE="log"), rank(1)
    connect(root, other, name="left")
    assert root.call(finalize) == []
    assert 'communicator "left" is alive' in root.program.errors()


def test_finalize_ends_a_creation_that_waits(rank):
    root = rank(0, MISUSE="log")
    info = root.call(root_info)
    waiting = root.begin(create, info, 0)
    assert root.call(finalize) == []
    assert waiting.result(1.0) in (E_INTERNAL, E_RUNTIME)


def test_ranks_on_two_servers_meet_where_the_host_address_says(rank, world):
    root = rank(0, HCCL_IF_IP="127.0.0.1")
    other = rank(0, HCCL_IF_IP="127.0.0.1", WORLD=world + ".other")
    connect(root, other, name="far")
    data = bytes(range(256)) * 4096
    root.call(buffer, "data", data)
    other.call(buffer, "data", len(data))
    for sender, receiver in ((root, other), (other, root)):
        peers = {root: 1, other: 0}
        calls = [
            on(sender, post, "Send", "data", len(data), peers[sender]),
            on(receiver, post, "Recv", "data", len(data), peers[receiver]),
        ]
        assert together(calls) == [SUCCESS] * 2
        assert together([on(root, synchronise), on(other, synchronise)]) == [SUCCESS] * 2
        assert receiver.call(contents, "data", len(data)) == data
    for each in (root, other):
        each.call(free, "data")
    disconnect(root, other)


def test_ranks_on_two_servers_without_host_address(rank, world):
    root, other = rank(0, TIME_SCALE="0.005", HCCL_IF_IP="127.0.0.1"), rank(1, WORLD=world + ".other")
    info = root.call(root_info)
    assert together([on(root, create, info, 0), on(other, create, info, 1)]) == [E_PARA] * 2
    assert "HCCL_IF_IP" in other.call(text)
    third = rank(2, TIME_SCALE="0.002")
    fourth = rank(3, TIME_SCALE="0.002", WORLD=world + ".other")
    info = third.call(root_info)
    assert together([on(third, create, info, 0), on(fourth, create, info, 1)]) == [E_TIMEOUT] * 2


def fork_a_child(state):
    """A child that outlives its parent; gives its process id."""
    child = os.fork()
    if child == 0:
        signal.pause()
    return child


def test_a_forked_child_does_not_stand_in_for_its_parent(rank):
    root, other = rank(0), rank(1, HCCL_EXEC_TIMEOUT=20)
    connect(root, other)
    for each in (root, other):
        each.call(buffer, "data", 64)
    assert together([on(root, post, "Send", "data", 64, 1), on(other, post, "Recv", "data", 64, 0)]) == [SUCCESS] * 2
    assert together([on(root, synchronise), on(other, synchronise)]) == [SUCCESS] * 2
    child = root.call(fork_a_child)
    try:
        root.program.kill()
        stuck = other.begin(post, "Send", "data", 64, 0)
        assert stuck.result() == E_TIMEOUT, "the peer is known to be gone"
    finally:
        os.kill(child, signal.SIGKILL)
    assert other.call(destroy) == SUCCESS


def test_what_a_killed_process_had_is_free_again(rank):
    root, other = rank(0), rank(1)
    before = root.call(free_memory)
    root.program.kill()
    killed = rank(0)
    connect(killed, other, buffer_mib=50)
    killed.call(buffer, "data", 1 << 20)
    assert killed.call(free_memory) < before - 100 * MIB
    killed.program.kill()
    assert rank(0).call(free_memory) == before
    assert other.call(destroy) == SUCCESS
    other.finish()


def test_an_asynchronous_error_on_order(rank):
    root, other = rank(0, FAULTS="exec.send=async(21)"), rank(1)
    connect(root, other)
    root.call(buffer, "data", b"x" * 64)
    other.call(buffer, "data", 64)
    assert together([on(root, post, "Send", "data", 64, 1), on(other, post, "Recv", "data", 64, 0)]) == [SUCCESS] * 2
    assert together([on(root, synchronise), on(other, synchronise)]) == [SUCCESS] * 2
    assert root.call(asynchronous_error) == 21
    assert root.call(counter, "fault.exec.send") == 1


def test_the_end_of_the_process_leaves_nothing_for_the_peer_to_wait_on(rank):
    root, other = rank(0), rank(1, HCCL_CONNECT_TIMEOUT="7200")
    connect(root, other)
    other.call(buffer, "data", 64)
    assert root.call(destroy) == SUCCESS
    root.finish()
    stuck = other.begin(post, "Send", "data", 64, 0)
    assert not stuck.done()
    assert other.call(destroy) == SUCCESS
    assert stuck.result(1.0) == E_INTERNAL
    other.call(abort)
