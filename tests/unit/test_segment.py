"""Segments: sealed sizes, read-only sharing, and memory that stays while someone looks at it."""

from __future__ import annotations

import mmap
import os

import pytest

from llm_datadist._segment import Segment

PAGE = mmap.PAGESIZE


def attach(segment: Segment, *, writable: bool) -> Segment:
    return Segment.attach(os.dup(segment.fileno()), writable=writable)


def test_a_segment_is_zeroed_and_rounded_up_to_pages() -> None:
    segment = Segment.create("test", 5000, peers_may_write=False)
    assert segment.size == -(-5000 // PAGE) * PAGE
    assert segment.address % PAGE == 0
    assert bytes(memoryview(segment)) == bytes(segment.size)
    segment.close()


def test_both_sides_see_the_same_bytes() -> None:
    owner = Segment.create("test", PAGE, peers_may_write=True)
    peer = attach(owner, writable=True)
    memoryview(owner)[3:6] = b"abc"
    assert bytes(memoryview(peer)[3:6]) == b"abc"
    memoryview(peer)[0:1] = b"x"
    assert bytes(memoryview(owner)[0:1]) == b"x"
    owner.close()
    peer.close()


def test_a_read_only_segment_cannot_be_written_by_anyone_else() -> None:
    owner = Segment.create("test", PAGE, peers_may_write=False)
    peer = attach(owner, writable=False)
    assert memoryview(peer).readonly
    with pytest.raises(PermissionError):
        attach(owner, writable=True)
    with pytest.raises(PermissionError):
        os.pwrite(owner.fileno(), b"x", 0)
    memoryview(owner)[0:1] = b"y"  # the owner's own mapping stays writable
    assert bytes(memoryview(peer)[0:1]) == b"y"
    owner.close()
    peer.close()


def test_nobody_can_change_the_size() -> None:
    owner = Segment.create("test", PAGE, peers_may_write=True)
    for size in (0, 2 * PAGE):
        with pytest.raises(PermissionError):
            os.ftruncate(owner.fileno(), size)
    owner.close()


def test_a_file_whose_size_can_change_is_not_attached() -> None:
    descriptor = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, PAGE)
    with pytest.raises(ValueError, match="not sealed"):
        Segment.attach(descriptor, writable=False)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_what_is_no_memfd_is_not_attached() -> None:
    reading, writing = os.pipe()
    os.close(writing)
    with pytest.raises(ValueError, match="no memfd"):
        Segment.attach(reading, writable=False)


def test_memory_outlives_close_while_a_view_is_alive() -> None:
    segment = Segment.create("test", PAGE, peers_may_write=False)
    view = memoryview(segment)[10:20]
    segment.close()
    segment.close()
    view[:3] = b"abc"
    assert bytes(view[:3]) == b"abc"
    assert segment.address != 0
    view.release()
    assert segment.address == 0
    with pytest.raises(BufferError):
        memoryview(segment)
    with pytest.raises(ValueError, match="closed"):
        segment.fileno()


def test_the_last_mapping_keeps_the_memory_of_a_closed_owner() -> None:
    owner = Segment.create("test", PAGE, peers_may_write=False)
    memoryview(owner)[:2] = b"ok"
    peer = attach(owner, writable=False)
    owner.close()
    assert bytes(memoryview(peer)[:2]) == b"ok"
    peer.close()


def test_populate_checks_its_range() -> None:
    segment = Segment.create("test", 4 * PAGE, peers_may_write=False)
    segment.populate(0, 4 * PAGE)
    segment.populate(PAGE + 7, 100)
    for offset, nbytes in ((0, 4 * PAGE + 1), (5 * PAGE, 0), (2**64 - 1, 2)):
        with pytest.raises(ValueError, match="not inside"):
            segment.populate(offset, nbytes)
    segment.close()


def test_an_empty_segment_is_refused() -> None:
    with pytest.raises(ValueError, match="> 0"):
        Segment.create("test", 0, peers_may_write=False)


def test_nothing_is_left_open() -> None:
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(20):
        owner = Segment.create("test", PAGE, peers_may_write=False)
        attach(owner, writable=False).close()
        del owner  # the destructor closes what nobody closed
    assert set(os.listdir("/proc/self/fd")) == before
