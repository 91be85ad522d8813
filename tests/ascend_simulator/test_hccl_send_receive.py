"""Sends and receives: what meets what, when they wait, and what a lost peer, an abort or a fault does to them."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.ascend_simulator.rank_process import (
    E_NOT_SUPPORT,
    E_PARA,
    E_PTR,
    E_TIMEOUT,
    INTERNAL_ERROR,
    STREAM_ABORT,
    STREAM_SYNC_TIMEOUT,
    SUCCESS,
    SUSPECT_REMOTE,
    UINT8,
    WAIT_TIMEOUT,
    Rank,
    abort,
    buffer,
    connect,
    contents,
    counter,
    destroy,
    disconnect,
    free,
    keeping_text,
    on,
    peek,
    post,
    post_batch,
    set_knob,
    synchronise,
    taken,
    text,
    together,
)

HOST_PATTERN = bytes(range(251))


def pattern(size: int) -> bytes:
    """Bytes in which a shift or a missing piece shows."""
    return (HOST_PATTERN * (size // len(HOST_PATTERN) + 1))[:size]


@pytest.fixture
def pair(program):
    """Starts sender and receiver with a communicator; knobs of one of them begin with sender_ or receiver_."""

    def start(**knobs: object) -> tuple[Rank, Rank]:
        def own(prefix: str) -> dict[str, object]:
            general = {k: v for k, v in knobs.items() if not k.startswith(("sender_", "receiver_"))}
            return general | {k[len(prefix) :]: v for k, v in knobs.items() if k.startswith(prefix)}

        sender = Rank(program(HBM_MIB=512, **own("sender_")), 0)
        receiver = Rank(program(HBM_MIB=512, **own("receiver_")), 1)
        connect(sender, receiver)
        return sender, receiver

    return start


def buffer_of(state, key, period, size):
    """A buffer that repeats some bytes; large ones are made where they are needed."""
    buffer(state, key, (period * (size // len(period) + 1))[:size])


def holds(state, key, period, size):
    """Whether a buffer repeats these bytes, and nothing else."""
    return contents(state, key, size) == (period * (size // len(period) + 1))[:size]


def has_byte(state, key, byte, size):
    """Whether a byte of this value is anywhere in a buffer."""
    return byte in peek(state, key, size)


def warm(sender: Rank, receiver: Rank) -> None:
    """The first operation, which sets the link up."""
    sender.call(buffer, "first", b"1" * 64)
    receiver.call(buffer, "first", 64)
    assert exchange(sender, receiver, "first", 64) == [SUCCESS] * 2


def exchange(sender: Rank, receiver: Rank, key: str, count: int) -> list[int]:
    """Post one pair, and the codes of the synchronises."""
    assert (
        together([on(sender, post, "Send", key, count, 1), on(receiver, post, "Recv", key, count, 0)]) == [SUCCESS] * 2
    )
    return together([on(sender, synchronise), on(receiver, synchronise)])


@pytest.mark.parametrize("size", [1, 65536, (2 << 20) + 3, 100 << 20])
def test_bytes_arrive_equal(pair, size):
    sender, receiver = pair()
    sender.call(buffer_of, "data", pattern(251), size)
    receiver.call(buffer, "data", size)
    assert exchange(sender, receiver, "data", size) == [SUCCESS] * 2
    assert receiver.call(holds, "data", pattern(251), size)
    sender.call(free, "data")
    receiver.call(free, "data")
    disconnect(sender, receiver)


def post_many(state, kind, count, size, peer):
    return [post(state, kind, "data", size, peer, offset=number * size) for number in range(count)]


def test_the_nth_send_meets_the_nth_receive(pair):
    sender, receiver = pair()
    data = b"".join(bytes([number]) * 100 for number in range(200))
    sender.call(buffer, "data", data)
    receiver.call(buffer, "data", len(data))
    codes = together([on(sender, post_many, "Send", 200, 100, 1), on(receiver, post_many, "Recv", 200, 100, 0)])
    assert codes == [[SUCCESS] * 200] * 2
    assert together([on(sender, synchronise), on(receiver, synchronise)]) == [SUCCESS] * 2
    assert receiver.call(contents, "data", len(data)) == data


def test_both_directions(pair):
    one, other = pair()
    warm(one, other)
    one.call(buffer, "back", 1000)
    other.call(buffer, "back", b"b" * 1000)
    assert together([on(one, post, "Recv", "back", 1000, 1), on(other, post, "Send", "back", 1000, 0)]) == [SUCCESS] * 2
    assert together([on(one, synchronise), on(other, synchronise)]) == [SUCCESS] * 2
    assert one.call(contents, "back", 1000) == b"b" * 1000


def test_the_first_operation_waits_inside_the_call_and_later_ones_do_not(pair):
    sender, receiver = pair(HCCL_CONNECT_TIMEOUT=7200)
    sender.call(buffer, "first", b"1" * 64)
    receiver.call(buffer, "first", 64)
    first = sender.begin(post, "Send", "first", 64, 1)
    receiver.call(counter, "live.communicators")
    assert not first.done()
    assert receiver.call(post, "Recv", "first", 64, 0) == SUCCESS
    assert first.result() == SUCCESS
    assert together([on(sender, synchronise), on(receiver, synchronise)]) == [SUCCESS] * 2
    assert sender.call(post, "Send", "first", 64, 1) == SUCCESS, "returns before the receiver has posted"
    assert sender.call(synchronise, 50) == STREAM_SYNC_TIMEOUT
    assert receiver.call(post, "Recv", "first", 64, 0) == SUCCESS
    assert together([on(sender, synchronise), on(receiver, synchronise)]) == [SUCCESS] * 2


def test_the_first_operation_gives_up_after_the_connect_timeout(pair):
    sender, receiver = pair(TIME_SCALE="0.002")
    sender.call(buffer, "first", b"1" * 64)
    began = time.monotonic()
    assert sender.call(post, "Send", "first", 64, 1) == E_TIMEOUT
    assert 0.2 < time.monotonic() - began < 5.0
    assert "rank 1" in sender.call(text)
    assert receiver.call(destroy) == SUCCESS


def test_each_direction_and_entry_point_is_warmed_by_itself(pair):
    sender, receiver = pair(TIME_SCALE="0.002")
    warm(sender, receiver)
    assert sender.call(post_batch, [(0, "first", 64, 1)]) == E_TIMEOUT
    assert receiver.call(post, "Send", "first", 64, 0) == E_TIMEOUT


def test_an_operation_of_no_bytes_meets_nobody(pair):
    sender, receiver = pair()
    sender.call(buffer, "data", 64)
    assert sender.call(post, "Send", "data", 0, 1) == SUCCESS
    assert sender.call(post_batch, [(0, "data", 0, 1)]) == SUCCESS
    assert sender.call(post_batch, []) == SUCCESS
    assert sender.call(synchronise) == SUCCESS
    sender.call(free, "data")
    disconnect(sender, receiver)


def test_arguments_that_are_refused(pair):
    sender, _ = pair(MISUSE="error")
    sender.call(buffer, "data", 64)
    assert sender.call(post, "Send", "data", (0x7FFFFFFFF) + 1, 1) == E_PARA
    assert sender.call(post, "Send", "data", 64, 2) == E_PARA
    assert sender.call(post, "Send", "data", 64, 0) == E_NOT_SUPPORT
    assert sender.call(post, "Send", "data", 64, 1, type=13) == E_NOT_SUPPORT
    assert sender.call(post_null, "buffer") == E_PTR
    assert sender.call(post_null, "stream") == E_PTR
    assert sender.call(post_null, "comm") == E_PTR
    assert sender.call(post, "Send", "data", 1 << 20, 1) == E_PARA
    assert sender.call(counter, "misuse.out_of_bounds") == 1


def post_null(state, what):
    values = [state["data"], 64, UINT8, 1, state["comm"], state["device"].stream]
    values[{"buffer": 0, "comm": 4, "stream": 5}[what]] = None
    return keeping_text(state, "HcclSend", *values)


def test_a_batch_does_not_wait_for_itself(pair):
    one, other = pair()
    for rank, letter in ((one, b"1"), (other, b"2")):
        rank.call(buffer, "out", letter * 5000)
        rank.call(buffer, "in", 5000)
        rank.call(buffer, "own", 5000)
    items = [(1, "in", 5000), (0, "out", 5000)]
    calls = [
        on(
            one,
            post_batch,
            [(kind, key, count, 1) for kind, key, count in items] + [(0, "out", 5000, 0), (1, "own", 5000, 0)],
        ),
        on(other, post_batch, [(kind, key, count, 0) for kind, key, count in reversed(items)]),
    ]
    assert together(calls) == [SUCCESS] * 2
    assert together([on(one, synchronise), on(other, synchronise)]) == [SUCCESS] * 2
    assert one.call(contents, "in", 5000) == b"2" * 5000
    assert other.call(contents, "in", 5000) == b"1" * 5000
    assert one.call(contents, "own", 5000) == b"1" * 5000


def test_a_batch_of_a_thousand(pair):
    sender, receiver = pair()
    data = pattern(64 * 1000)
    sender.call(buffer, "data", data)
    receiver.call(buffer, "data", len(data))
    calls = [on(sender, post_scattered, 0, 1), on(receiver, post_scattered, 1, 0)]
    assert together(calls) == [SUCCESS] * 2
    assert together([on(sender, synchronise), on(receiver, synchronise)]) == [SUCCESS] * 2
    assert receiver.call(contents, "data", len(data)) == data


def post_scattered(state, kind, peer):
    for number in range(1000):
        state[f"part {number}"] = state["data"] + 64 * number
    return post_batch(state, [(kind, f"part {number}", 64, peer) for number in range(1000)])


def test_a_send_to_oneself_without_receive(pair):
    sender, _ = pair(MISUSE="error")
    sender.call(buffer, "data", 64)
    assert sender.call(post_batch, [(0, "data", 64, 0)]) == E_PARA
    assert sender.call(post_batch, [(1, "data", 64, 0)]) == E_PARA
    assert sender.call(counter, "misuse.comm_unmatched") == 2


def test_first_operations_that_differ(pair):
    sender, receiver = pair(MISUSE="error")
    sender.call(buffer, "data", 64)
    receiver.call(buffer, "data", 64)
    calls = [on(sender, post, "Send", "data", 64, 1), on(receiver, post, "Recv", "data", 32, 0)]
    assert together(calls) == [E_PARA] * 2
    assert [rank.call(counter, "misuse.comm_order") for rank in (sender, receiver)] == [1, 1]


def test_later_operations_that_differ(pair):
    sender, receiver = pair(MISUSE="error")
    warm(sender, receiver)
    calls = [on(sender, post, "Send", "first", 64, 1), on(receiver, post, "Recv", "first", 32, 0)]
    assert together(calls) == [SUCCESS] * 2
    assert together([on(sender, synchronise), on(receiver, synchronise)]) == [INTERNAL_ERROR] * 2
    assert [rank.call(counter, "misuse.comm_order") for rank in (sender, receiver)] == [1, 1]


def test_a_mismatch_ends_the_process_by_default(pair):
    sender, receiver = pair(sender_MISUSE="error")
    warm(sender, receiver)
    assert sender.call(post, "Send", "first", 64, 1) == SUCCESS
    assert "misuse comm_order" in receiver.aborts(post_and_wait, "Recv", "first", 32, 0)


def post_and_wait(state, *args):
    return post(state, *args), synchronise(state)


def test_two_streams(pair):
    sender, receiver = pair(MISUSE="error")
    warm(sender, receiver)
    assert sender.call(post, "Send", "first", 64, 1) == SUCCESS
    assert sender.call(post_on_new_stream, "first") == E_PARA
    assert sender.call(counter, "misuse.comm_two_streams") == 1
    assert receiver.call(post, "Recv", "first", 64, 0) == SUCCESS
    assert together([on(sender, synchronise), on(receiver, synchronise)]) == [SUCCESS] * 2
    assert sender.call(post_on_new_stream, "first") == SUCCESS, "one after the other is allowed"


def post_on_new_stream(state, key):
    state["stream"] = taken(state).new_stream()
    code = post(state, "Send", key, 64, 1)
    del state["stream"]
    return code


def test_destroying_with_operations_queued(pair):
    sender, receiver = pair(MISUSE="error")
    warm(sender, receiver)
    assert sender.call(post, "Send", "first", 64, 1) == SUCCESS
    assert sender.call(destroy) == E_PARA
    assert sender.call(counter, "misuse.comm_busy_destroy") == 1
    assert receiver.call(destroy) == E_PARA
    assert receiver.call(counter, "misuse.comm_unmatched") == 1
    sender.call(set_knob, "MISUSE", "log")
    assert sender.call(destroy) == SUCCESS
    assert sender.call(synchronise) == INTERNAL_ERROR


def test_abort_and_destroy(pair):
    sender, receiver = pair()
    warm(sender, receiver)
    assert sender.call(post, "Send", "first", 64, 1) == SUCCESS
    waiting = sender.begin(synchronise)
    sender.call(abort)
    assert waiting.result(2.0) == STREAM_ABORT
    assert [rank.call(destroy) for rank in (sender, receiver)] == [SUCCESS] * 2, "an abort leaves no partner behind"
    for rank in (sender, receiver):
        rank.call(free, "first")
        rank.finish()


def test_operations_behind_an_abort_have_no_order(pair):
    sender, receiver = pair(MISUSE="error")
    warm(sender, receiver)
    assert sender.call(post, "Send", "first", 64, 1) == SUCCESS
    sender.call(abort)
    assert sender.call(post, "Send", "first", 64, 1) == E_PARA
    assert sender.call(counter, "misuse.comm_order") == 1


def test_nothing_is_written_after_an_abort(pair):
    sender, receiver = pair(PIECE_KIB=4)
    warm(sender, receiver)
    size = 64 << 20
    sender.call(buffer_of, "data", b"\1", size)
    receiver.call(buffer_of, "data", b"\0", size)
    calls = [on(sender, post, "Send", "data", size, 1), on(receiver, post, "Recv", "data", size, 0)]
    assert together(calls) == [SUCCESS] * 2
    assert receiver.call(abort_in_the_middle, size) == (True, True)
    sender.call(abort)


def abort_in_the_middle(state, size):
    """Abort when some bytes are there: whether some were missing, and whether none came later."""
    device = taken(state)
    while device.peek(state["data"], 1) != b"\1":
        pass
    abort(state)
    kept = device.peek(state["data"], size)
    return b"\0" in kept, device.peek(state["data"], size) == kept


def test_a_sender_that_is_killed(pair):
    sender, receiver = pair(receiver_HCCL_EXEC_TIMEOUT=50)
    warm(sender, receiver)
    assert receiver.call(post, "Recv", "first", 64, 0) == SUCCESS
    sender.program.kill()
    assert receiver.call(synchronise, 100) == STREAM_SYNC_TIMEOUT, "the device waits for a notification"
    assert receiver.call(synchronise) == WAIT_TIMEOUT, "until the scaled time limit"
    assert receiver.call(destroy) == SUCCESS
    receiver.call(free, "first")
    receiver.finish()


def test_a_receiver_that_is_killed(pair):
    sender, receiver = pair()
    warm(sender, receiver)
    assert sender.call(post, "Send", "first", 64, 1) == SUCCESS
    receiver.program.kill()
    assert sender.call(synchronise, 100) == STREAM_SYNC_TIMEOUT
    sender.call(abort)
    assert sender.call(destroy) == SUCCESS
    sender.call(free, "first")
    sender.finish()


def test_a_sender_that_is_killed_in_the_middle(pair):
    sender, receiver = pair(PIECE_KIB=4)
    warm(sender, receiver)
    size = 64 << 20
    sender.call(buffer_of, "data", b"\1", size)
    receiver.call(buffer_of, "data", b"\0", size)
    calls = [on(sender, post, "Send", "data", size, 1), on(receiver, post, "Recv", "data", size, 0)]
    assert together(calls) == [SUCCESS] * 2
    while receiver.call(peek, "data", 1) != b"\1":
        pass
    sender.program.kill()
    assert receiver.call(synchronise, 200) == STREAM_SYNC_TIMEOUT
    receiver.call(abort)
    assert receiver.call(has_byte, "data", b"\0", size)


def test_a_sender_that_is_stopped_cannot_write_later(pair):
    sender, receiver = pair()
    warm(sender, receiver)
    sender.call(buffer, "data", b"\1" * 4096)
    receiver.call(buffer, "data", b"\0" * 4096)
    os.kill(sender.pid, signal.SIGSTOP)
    assert receiver.call(post, "Recv", "data", 4096, 0) == SUCCESS
    assert receiver.call(synchronise, 100) == STREAM_SYNC_TIMEOUT
    receiver.call(abort)
    os.kill(sender.pid, signal.SIGCONT)
    assert sender.call(post, "Send", "data", 4096, 1) == SUCCESS
    assert sender.call(synchronise, 100) == STREAM_SYNC_TIMEOUT
    assert receiver.call(contents, "data", 4096) == b"\0" * 4096


def test_a_peer_that_destroyed_its_communicator_counts_as_dead(pair):
    sender, receiver = pair(HCCL_EXEC_TIMEOUT=30)
    warm(sender, receiver)
    assert receiver.call(destroy) == SUCCESS
    assert sender.call(post, "Send", "first", 64, 1) == SUCCESS
    assert sender.call(synchronise) == WAIT_TIMEOUT


@pytest.mark.parametrize("side", ["sender", "receiver"])
@pytest.mark.parametrize(
    ("action", "codes", "right"),
    [
        ("drop", [SUCCESS, SUCCESS], False),
        ("corrupt", [SUCCESS, SUCCESS], False),
        ("delay(50)", [SUCCESS, SUCCESS], True),
        ("async(21)", [SUCCESS, SUCCESS], True),
        ("code(507999)", [507999, STREAM_SYNC_TIMEOUT], False),
        ("half", [SUSPECT_REMOTE, STREAM_SYNC_TIMEOUT], False),
        ("hang", [STREAM_SYNC_TIMEOUT, STREAM_SYNC_TIMEOUT], False),
        ("eof", [STREAM_SYNC_TIMEOUT, STREAM_SYNC_TIMEOUT], False),
    ],
)
def test_faults_of_the_execution(pair, side, action, codes, right):
    where = {"sender": "exec.send", "receiver": "exec.recv"}[side]
    sender, receiver = pair(**{f"{side}_FAULTS": f"{where}#2={action}"})
    warm(sender, receiver)
    data = pattern(100_000)
    sender.call(buffer, "data", data)
    receiver.call(buffer, "data", b"\xff" * len(data))
    calls = [on(sender, post, "Send", "data", len(data), 1), on(receiver, post, "Recv", "data", len(data), 0)]
    assert together(calls) == [SUCCESS] * 2
    faulty, peer = (sender, receiver) if side == "sender" else (receiver, sender)
    timeout = 20_000 if codes[1] == SUCCESS else 300
    assert together([on(faulty, synchronise, timeout), on(peer, synchronise, timeout)]) == codes
    arrived = receiver.call(peek, "data", len(data))
    assert (arrived == data) == right
    if action == "half":
        assert arrived == data[:50_000] + b"\xff" * 50_000
    if action == "corrupt":
        assert sum(a != b for a, b in zip(arrived, data)) == 1
    assert faulty.call(counter, f"fault.{where}") == 1


@pytest.mark.parametrize("where", ["link.meet", "link.peer"])
@pytest.mark.parametrize(("action", "code"), [("code(9)", 9), ("delay(30)", SUCCESS), ("async(21)", SUCCESS)])
def test_faults_of_the_meeting(pair, where, action, code):
    # The first one at link.meet is in the creation.
    occurrence = 2 if where == "link.meet" else 1
    sender, receiver = pair(TIME_SCALE="0.005", sender_FAULTS=f"{where}#{occurrence}={action}")
    sender.call(buffer, "first", 64)
    receiver.call(buffer, "first", 64)
    calls = [on(sender, post, "Send", "first", 64, 1), on(receiver, post, "Recv", "first", 64, 0)]
    assert together(calls) == ([SUCCESS] * 2 if code == SUCCESS else [code, E_TIMEOUT])
    assert sender.call(counter, f"fault.{where}") == 1


@pytest.mark.parametrize("where", ["link.meet", "link.peer"])
def test_a_connection_that_breaks_in_the_meeting(pair, where):
    occurrence = 2 if where == "link.meet" else 1
    sender, receiver = pair(TIME_SCALE="0.005", sender_FAULTS=f"{where}#{occurrence}=eof")
    sender.call(buffer, "first", 64)
    receiver.call(buffer, "first", 64)
    calls = [on(sender, post, "Send", "first", 64, 1), on(receiver, post, "Recv", "first", 64, 0)]
    assert E_TIMEOUT in together(calls)
    assert sender.call(counter, f"fault.{where}") == 1


def test_a_meeting_that_hangs_is_ended_by_destroying(pair):
    sender, receiver = pair(sender_FAULTS="link.meet#2=hang")
    sender.call(buffer, "first", 64)
    stuck = sender.begin(post, "Send", "first", 64, 1)
    while sender.call(counter, "fault.link.meet") == 0:
        pass
    assert not stuck.done()
    assert sender.call(destroy) == SUCCESS
    assert stuck.result(1.0) != SUCCESS
    assert receiver.call(destroy) == SUCCESS


@pytest.mark.parametrize("where", ["link.meet#2", "link.peer", "exec.send", "HcclSend"])
def test_a_process_that_kills_itself(pair, where):
    sender, receiver = pair(sender_FAULTS=f"{where}=kill", receiver_TIME_SCALE="0.005")
    sender.call(buffer, "first", b"1" * 64)
    receiver.call(buffer, "first", 64)
    waiting = receiver.begin(post, "Recv", "first", 64, 0)
    sender.aborts(post_and_wait, "Send", "first", 64, 1, by=signal.SIGKILL)
    assert waiting.result() in (SUCCESS, E_TIMEOUT)
    if where == "exec.send":
        assert receiver.call(synchronise, 100) == STREAM_SYNC_TIMEOUT
        receiver.call(abort)
    assert receiver.call(destroy) == SUCCESS


@pytest.mark.parametrize(
    "name", ["HcclSend", "HcclRecv", "HcclBatchSendRecv", "HcclBarrier", "HcclCommDestroy", "HcclCommPrepare"]
)
def test_the_interpreter_must_not_be_held(program, name):
    process = program(hold_interpreter=True, MISUSE="log")
    process.call(start_and_call, name)
    assert f"{name}: may wait, and the thread holds the interpreter lock" in process.errors()


def start_and_call(acl, name):
    acl.start()
    getattr(acl, name)(*[None] * 6)
