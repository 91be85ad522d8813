"""Local copies of caches on a device, against copies in numpy: every way the bytes may go, and every way it may end."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import pytest

from llm_datadist._acl import AclError, Device, DeviceMemory, PinnedMemory
from llm_datadist._ascend_copies import MOST_LANES, AscendCopier
from llm_datadist._local import LocalCache, block_pairs
from llm_datadist._local_copies import LocalOutcome
from tests.on_simulator import counter, on_simulator, set_knob, soon

Array = npt.NDArray[np.uint8]
MIB = 1 << 20
TENSORS, BLOCKS = 3, 8


class Rig:
    """A copier, and a cache on the device whose tensors have a gap between them, so that any stride may be tried."""

    def __init__(self, stride: int, tensors: int = TENSORS, blocks: int = BLOCKS) -> None:
        self.device = Device(0)
        self.copier = AscendCopier(self.device, 2)
        self.shape = (tensors, blocks, stride)
        self.step = blocks * stride + (-blocks * stride) % 512 + 512
        self.memory = DeviceMemory(self.device, tensors * self.step)
        self.cache = LocalCache(1, self.memory.address, self.step, blocks * stride, stride, tensors, blocks)

    def put(self, content: Array) -> None:
        for index, tensor in enumerate(content):
            assert self.copier.write(self.memory.address + index * self.step, tensor, soon()) == LocalOutcome.DONE

    def get(self) -> Array:
        content = np.zeros(self.shape, np.uint8)
        for index, tensor in enumerate(content):
            assert self.copier.read(self.memory.address + index * self.step, tensor, soon()) == LocalOutcome.DONE
        return content

    def close(self) -> None:
        assert self.copier.close(soon())
        self.memory.close()
        self.device.close()
        assert counter("live.streams") == counter("live.events") == counter("live.allocations") == 0
        assert counter("live.host") == 0


@contextmanager
def rig(stride: int, tensors: int = TENSORS, blocks: int = BLOCKS) -> Iterator[Rig]:
    made = Rig(stride, tensors, blocks)
    yield made
    made.close()


def content(*shape: int) -> Array:
    return np.random.default_rng(list(shape)).integers(0, 256, shape, np.uint8)


def tables(count: int) -> Iterator[list[tuple[int, int]]]:
    """Block tables with runs of neighbours, with targets that come again, and with targets that are sources later."""
    chance = random.Random(7)
    for _ in range(count):
        table: list[tuple[int, int]] = []
        for _ in range(chance.randrange(6)):
            source, target, length = chance.randrange(BLOCKS), chance.randrange(BLOCKS), chance.randrange(1, 4)
            table += [(source + i, target + i) for i in range(length) if max(source, target) + i < BLOCKS]
        yield table


@pytest.mark.parametrize("variant", ["", "old"])
def test_bytes_come_back_from_the_device(variant: str) -> None:
    on_simulator(variant)(there_and_back)()


def there_and_back() -> None:
    device = Device(0)
    copier = AscendCopier(device)
    memory = DeviceMemory(device, 101 * MIB)
    pinned = PinnedMemory(device, 3 * MIB)
    for nbytes in (0, 1, 63, 64, 65, 4095, 4097, 2 * MIB + 1, 4 * MIB, 100 * MIB):
        data = np.random.default_rng(nbytes).bytes(nbytes)
        back = bytearray(nbytes)
        assert copier.write(memory.address + 1, data, soon()) == LocalOutcome.DONE
        assert copier.read(memory.address + 1, back, soon()) == LocalOutcome.DONE
        assert back == data, nbytes
    view = memoryview(pinned)
    view[:] = np.random.default_rng(1).bytes(pinned.size)
    wanted = bytes(view)
    recorded = counter("calls.aclrtRecordEvent")
    copier.write(memory.address, view, soon())
    view[:] = bytes(len(view))
    copier.read(memory.address, view, soon())
    assert bytes(view) == wanted
    if variant_tells_pinned():
        assert counter("calls.aclrtRecordEvent") == recorded, "pinned memory needs no buffer"
    view.release()
    pinned.close()
    copier.close(soon())
    memory.close()
    device.close()


def variant_tells_pinned() -> bool:
    return counter("calls.aclrtPointerGetAttributes") > 0


@on_simulator(MIN_DELAY_US=0)
def test_blocks_are_copied_one_pair_after_the_other() -> None:
    for stride in (64, 40):  # 40: most addresses are no multiples of 64, which the slower call takes
        with rig(stride) as it:
            for table in tables(40):
                before = content(*it.shape)
                it.put(before)
                for source, target in table:
                    before[:, target] = before[:, source]
                pairs = block_pairs([source for source, _ in table], [target for _, target in table])
                assert it.copier.copy_blocks(it.cache, pairs, soon()) == LocalOutcome.DONE
                np.testing.assert_array_equal(it.get(), before, err_msg=f"{table}")
    assert counter("calls.aclrtMemcpy") > 0


@on_simulator(MIN_DELAY_US=0)
def test_a_chain_of_neighbours_carries_its_first_block_to_all() -> None:
    for step in (1, -1):
        with rig(4096) as it:
            before = content(*it.shape)
            it.put(before)
            chain = list(range(BLOCKS))[::step]
            it.copier.copy_blocks(it.cache, block_pairs(chain[:-1], chain[1:]), soon())
            np.testing.assert_array_equal(it.get(), np.repeat(before[:, [0 if step == 1 else -1]], BLOCKS, axis=1))


@on_simulator(MIN_DELAY_US=0)
def test_blocks_are_swapped_in_order_with_any_memory_of_the_host() -> None:
    for stride in (24, 4096):
        with rig(stride) as it:
            pinned = PinnedMemory(it.device, TENSORS * BLOCKS * stride)
            places = [np.zeros(it.shape, np.uint8), np.frombuffer(pinned, np.uint8).reshape(it.shape)]
            for number, table in enumerate(tables(40)):
                host, swap_in = places[number % 2], number % 4 < 2
                host[:] = content(*it.shape)[::-1]
                it.put(content(*it.shape))
                wanted_device, wanted_host = it.get(), host.copy()
                wanted_target, wanted_source = (wanted_device, wanted_host)[:: 1 if swap_in else -1]
                for source, target in table:
                    wanted_target[:, target] = wanted_source[:, source]
                pairs = block_pairs([source for source, _ in table], [target for _, target in table])
                addresses = [tensor.ctypes.data for tensor in host]
                assert it.copier.swap_blocks(it.cache, addresses, pairs, stride, swap_in, soon()) == LocalOutcome.DONE
                np.testing.assert_array_equal(it.get(), wanted_device, err_msg=f"{table}")
                np.testing.assert_array_equal(host, wanted_host, err_msg=f"{table}")
            places.clear()
            del host
            pinned.close()


@on_simulator()
def test_large_and_many_blocks_go_through_the_buffers() -> None:
    for stride, blocks in ((3 * MIB + 24, 4), (1024, 2000)):  # a block is more than a buffer holds; more than it counts
        with rig(stride, 2, blocks) as it:
            host = content(*it.shape)
            addresses = [tensor.ctypes.data for tensor in host]
            order = list(range(0, blocks, 2)) + list(range(1, blocks, 2))  # nothing joins
            pairs = block_pairs(order, order[::-1])
            assert it.copier.swap_blocks(it.cache, addresses, pairs, stride, True, soon()) == LocalOutcome.DONE
            back = np.zeros_like(host)
            addresses = [tensor.ctypes.data for tensor in back]
            pairs = block_pairs(order[::-1], order)
            assert it.copier.swap_blocks(it.cache, addresses, pairs, stride, False, soon()) == LocalOutcome.DONE
            np.testing.assert_array_equal(back, host)


@on_simulator()
def test_slots_of_caches_on_the_host_and_on_the_device() -> None:
    with rig(256) as it:
        host = content(*it.shape)
        other = np.zeros(it.shape, np.uint8)
        on_host = [
            LocalCache(number, array.ctypes.data, BLOCKS * 256, BLOCKS * 256, 256, TENSORS, BLOCKS)
            for number, array in ((2, host), (3, other))
        ]
        it.put(np.zeros(it.shape, np.uint8))
        assert it.copier.copy_slot(it.cache, on_host[0], 5, 2, 3, 250, soon()) == LocalOutcome.DONE
        assert it.copier.copy_slot(it.cache, it.cache, 6, 5, 0, 256, soon()) == LocalOutcome.DONE
        assert it.copier.copy_slot(on_host[1], it.cache, 1, 6, 0, 256, soon()) == LocalOutcome.DONE
        assert it.copier.copy_slot(on_host[1], on_host[0], 0, 7, 0, 256, soon()) == LocalOutcome.DONE
        np.testing.assert_array_equal(other[:, 1, 3:253], host[:, 2, 3:253])
        assert not other[:, 1, :3].any()
        assert not other[:, 1, 253:].any()
        np.testing.assert_array_equal(other[:, 0], host[:, 7])


@on_simulator()
def test_a_deadline_ends_the_copy_before_its_memory_may_be_reused() -> None:
    with rig(1 * MIB) as it:
        host = np.full(it.shape, 1, np.uint8)
        addresses = [tensor.ctypes.data for tensor in host]
        pairs = block_pairs(list(range(BLOCKS)), list(range(BLOCKS)))
        it.put(np.zeros(it.shape, np.uint8))
        set_knob("FAULTS", "exec.copy#2=hang")
        begin = time.monotonic()
        for swap_in in (True, False):
            set_knob("FAULTS", "exec.copy#2=hang")
            outcome = it.copier.swap_blocks(it.cache, addresses, pairs, 1 * MIB, swap_in, soon(0.5))
            assert outcome == LocalOutcome.TIMED_OUT
            assert not it.cache.pinned
        assert time.monotonic() - begin < 5.0
        assert counter("calls.aclrtStreamAbort") == 2
        set_knob("FAULTS", "")
        seen = it.get()
        host[:] = 2
        np.testing.assert_array_equal(it.get(), seen, err_msg="the copy that was given up goes on")
        assert it.copier.copy_blocks(it.cache, block_pairs([0], [1]), 0) == LocalOutcome.TIMED_OUT
        assert it.copier.swap_blocks(it.cache, addresses, pairs, 1 * MIB, True, soon()) == LocalOutcome.DONE
        assert (it.get() == 2).all()


@on_simulator()
def test_an_error_of_the_device_is_told_and_the_next_copy_works() -> None:
    with rig(4096) as it:
        it.put(content(*it.shape))
        for fault, code in (
            ("exec.copy#2=code(507053)", 507053),
            ("aclrtMemcpyAsync#2=code(507899)", 507899),
            ("exec.copy#1=half", 507057),
        ):
            set_knob("FAULTS", fault)
            with pytest.raises(AclError) as error:
                it.copier.copy_blocks(it.cache, block_pairs([0, 4], [1, 6]), soon())
            assert (error.value.function, error.value.code) == ("aclrtMemcpyAsync", code)
            assert not it.cache.pinned
            set_knob("FAULTS", "")
            assert it.copier.copy_blocks(it.cache, block_pairs([0], [1]), soon()) == LocalOutcome.DONE


@on_simulator()
def test_what_cannot_be_aborted_stays_taken() -> None:
    made = Rig(4096)
    set_knob("FAULTS", "exec.copy=delay(2000);aclrtStreamAbort=code(507899)")
    outcome = made.copier.copy_blocks(made.cache, block_pairs([0], [1]), soon(0.02))
    assert outcome == LocalOutcome.TIMED_OUT
    assert made.cache.pinned, "its memory must not be given to another cache"
    set_knob("FAULTS", "")
    assert made.copier.copy_blocks(made.cache, block_pairs([2], [3]), soon()) == LocalOutcome.DONE
    assert made.copier.close(soon())
    made.memory.close()
    made.device.close()
    assert counter("calls.aclrtFree") == counter("calls.aclrtResetDevice") == 0


@on_simulator()
def test_no_room_for_buffers_is_an_error_and_not_the_end() -> None:
    with rig(64) as it:
        set_knob("FAULTS", "aclrtMallocHost=code(207001)")
        with pytest.raises(AclError) as refused:
            it.put(content(*it.shape))
        assert refused.value.code == 207001
        set_knob("FAULTS", "aclrtCreateStreamWithConfig=code(207008);aclrtCreateStream=code(207008)")
        with pytest.raises(AclError) as refused:
            it.put(content(*it.shape))
        assert refused.value.code == 207008
        set_knob("FAULTS", "")
        it.put(content(*it.shape))


@on_simulator()
def test_copies_run_beside_each_other_and_share_the_lanes() -> None:
    with rig(64 * 1024) as it:
        outcomes: list[LocalOutcome] = []
        it.put(content(*it.shape))
        set_knob("MIN_DELAY_US", 20_000)

        def copies(block: int) -> None:
            for _ in range(3):
                outcomes.append(it.copier.copy_blocks(it.cache, block_pairs([block], [(block + 1) % BLOCKS]), soon()))

        before = counter("live.streams")
        threads = [threading.Thread(target=copies, args=(block,)) for block in range(BLOCKS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert outcomes == [LocalOutcome.DONE] * (3 * BLOCKS)
        assert before < counter("live.streams") <= MOST_LANES


@on_simulator()
def test_closing_ends_copies_that_run_and_that_wait_for_a_lane() -> None:
    made = Rig(4096)
    set_knob("FAULTS", "exec.copy=hang")
    outcomes: list[LocalOutcome] = []
    copy = block_pairs([0], [1])
    threads = [
        threading.Thread(target=lambda: outcomes.append(made.copier.copy_blocks(made.cache, copy, soon(60.0))))
        for _ in range(MOST_LANES + 2)
    ]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 20.0
    while counter("calls.aclrtMemcpyAsync") < MOST_LANES:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    made.close()
    for thread in threads:
        thread.join()
    assert outcomes == [LocalOutcome.CLOSED] * len(threads)
    assert made.copier.copy_blocks(made.cache, copy, soon()) == LocalOutcome.CLOSED


@on_simulator()
def test_a_released_cache_is_not_touched() -> None:
    with rig(64) as it:
        released = LocalCache(2, it.memory.address, it.step, BLOCKS * 64, 64, TENSORS, BLOCKS)
        released.release()
        copies = counter("calls.aclrtMemcpyAsync")
        assert it.copier.copy_slot(it.cache, released, 0, 1, 0, 64, soon()) == LocalOutcome.CACHE_RELEASED
        assert it.copier.copy_slot(released, it.cache, 0, 1, 0, 64, soon()) == LocalOutcome.CACHE_RELEASED
        assert not it.cache.pinned
        assert counter("calls.aclrtMemcpyAsync") == copies


@on_simulator(FAULTS="exec.copy=drop", MIN_DELAY_US=0)
def test_these_tests_see_a_copy_that_does_nothing() -> None:
    with rig(64) as it:
        before = content(*it.shape)
        it.put(before)
        assert (it.get() != before).any()
    assert counter("fault.exec.copy") > 0
