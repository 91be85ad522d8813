"""Communicators of two ranks: what is checked before HCCL sees it, and how they begin and end."""

from __future__ import annotations

import os
import threading
import time

import pytest

from llm_datadist._acl import Device
from llm_datadist._hccl import ROOT_INFO_BYTES, Communicator, HcclError, load, one_sided, sets_defaults
from llm_datadist._shared_library import LibraryMissing
from tests.on_simulator import Connection, counter, on_simulator, pair_on_simulator, set_knob, soon

MIB = 1 << 20


def second_rank(peer: Connection) -> None:
    """Make the other communicator of each that the first rank makes, and end it when the first rank says so."""
    device = Device(1)
    peer.send("ready")
    while (request := peer.recv()) is not None:
        root_info, name = request
        communicator = Communicator(device, root_info, 1, name, 2, 5)
        assert communicator.async_error() == 0
        peer.recv()
        assert communicator.destroy(soon()), communicator.failure
        peer.send("destroyed")
    device.close()


def make_with_peer(peer: Connection, device: Device, name: str) -> Communicator:
    info = Communicator.root_info(device)
    assert len(info) == ROOT_INFO_BYTES
    peer.send((info, name))
    return Communicator(device, info, 0, name, 2, 5)


@pytest.mark.parametrize("variant", ["", "old"])
def test_two_ranks_meet_and_part(variant: str) -> None:
    pair_on_simulator(meet_and_part, second_rank, variant, TIME_SCALE=0.2)


def meet_and_part(peer: Connection) -> None:
    device = Device(0)
    free = device.memory_info()[0]
    peer.recv()
    for number in range(2):
        name = f"link {number}" + "x" * (121 * number)
        communicator = make_with_peer(peer, device, name)
        assert (communicator.rank, communicator.name, communicator.async_error()) == (0, name, 0)
        assert 0 < free - device.memory_info()[0] <= 5 * MIB, "the staging buffers are as small as asked"
        peer.send("destroy")
        peer.recv()
        assert communicator.destroy(soon())
        assert communicator.destroy(soon())
        assert communicator.failure is None
        with pytest.raises(HcclError, match="destroyed"):
            communicator.async_error()
    peer.send(None)
    assert device.memory_info()[0] == free
    device.close()
    assert counter("live.communicators") == 0


@on_simulator()
def test_arguments_are_checked_before_hccl_sees_them() -> None:
    device = Device(0)
    info = bytes(ROOT_INFO_BYTES)
    for arguments, message in (
        ((info[1:], 0, "name", 1, 1), "4107 bytes"),
        ((info, 2, "name", 1, 1), "rank 2"),
        ((info, 0, "", 1, 1), "1 to 127"),
        ((info, 0, "n" * 128, 1, 1), "1 to 127"),
        ((info, 0, "n\0m", 1, 1), "1 to 127"),
        ((info, 0, "ä", 1, 1), "ASCII"),
        ((info, 0, "name", 0, 1), "0 MiB"),
        ((info, 0, "name", 1, 0), "0 s"),
    ):
        with pytest.raises(ValueError, match=message):
            Communicator(device, *arguments)
    assert counter("calls.HcclCommInitRootInfoConfig") == 0
    device.close()
    assert counter("calls.aclrtResetDevice") == 1


@on_simulator(TIME_SCALE=0.02)
def test_a_peer_that_does_not_come_holds_up_its_device_alone() -> None:
    device = Device(0)
    info = Communicator.root_info(device)
    errors: list[HcclError] = []

    def make() -> None:
        try:
            Communicator(device, info, 0, "name", 1, 1)
        except HcclError as error:
            errors.append(error)

    thread = threading.Thread(target=make)
    thread.start()
    deadline = time.monotonic() + 20
    while counter("calls.HcclCommInitRootInfoConfig") == 0:
        assert time.monotonic() < deadline
    begin = time.monotonic()
    with pytest.raises(HcclError, match="another communicator is being made on device 0") as busy:
        Communicator(device, info, 0, "second", 1, 1)
    assert busy.value.code == 20
    assert time.monotonic() - begin < 0.5
    thread.join()
    assert [(error.function, error.code) for error in errors] == [("HcclCommInitRootInfoConfig", 9)]
    assert errors[0].text
    with pytest.raises(HcclError) as again:  # the device is free for the next one, which fails for its own reason
        Communicator(device, bytes(ROOT_INFO_BYTES), 0, "second", 1, 1)
    assert again.value.code != 20
    device.close()


def test_a_busy_communicator_is_destroyed_when_it_is_idle() -> None:
    pair_on_simulator(busy, second_rank, TIME_SCALE=0.2)


def busy(peer: Connection) -> None:
    device = Device(0)
    peer.recv()
    communicator = make_with_peer(peer, device, "name")
    set_knob("FAULTS", "HcclCommDestroy#1=code(20);HcclCommDestroy#2=code(20);HcclCommDestroy#3=code(4)")
    assert not communicator.destroy(0)
    assert communicator.failure is not None
    assert communicator.failure.code == 20
    assert not communicator.destroy(soon())
    assert communicator.failure.code == 4
    assert communicator.async_error() == 0, "it is still there"
    assert communicator.destroy(soon())
    device.close()
    assert counter("calls.aclrtResetDevice") == 1
    peer.send("destroy")
    assert peer.recv() == "destroyed"
    peer.send(None)


def test_a_dropped_communicator_is_destroyed() -> None:
    pair_on_simulator(dropped, second_rank, TIME_SCALE=0.2)


def dropped(peer: Connection) -> None:
    device = Device(0)
    peer.recv()
    communicator = make_with_peer(peer, device, "name")
    device.close()
    assert communicator.async_error() == 0
    del communicator
    assert counter("live.communicators") == 0
    assert counter("calls.aclrtResetDevice") == 1
    peer.send("destroy")
    assert peer.recv() == "destroyed"
    peer.send(None)


@pytest.mark.parametrize("variant", ["", "no_onesided", "acl_only"])
def test_what_a_release_lacks_is_told(variant: str) -> None:
    on_simulator(variant)(what_is_missing)(name=variant)


def what_is_missing(name: str) -> None:
    if name == "acl_only":
        with pytest.raises(LibraryMissing, match="Hccl.* is missing in"):
            load()
        return
    paths, missing = load()
    assert paths
    assert one_sided() == (name == "")
    assert ("HcclBatchGet" in missing) == (name == "no_onesided")


def test_the_waits_of_hccl_are_set_where_the_user_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HCCL_RDMA_TIMEOUT", "HCCL_RDMA_RETRY_CNT", "HCCL_CONNECT_TIMEOUT"):
        monkeypatch.setenv(name, "")  # so that it is restored afterwards
        monkeypatch.delenv(name)
    assert sets_defaults(1.0) == []
    assert (os.environ["HCCL_RDMA_TIMEOUT"], os.environ["HCCL_CONNECT_TIMEOUT"]) == ("15", "120")
    monkeypatch.setenv("HCCL_RDMA_TIMEOUT", "20")
    monkeypatch.setenv("HCCL_CONNECT_TIMEOUT", "600")
    first, second = sets_defaults(1.0)
    assert "HCCL_RDMA_TIMEOUT=20 with 7 tries" in first
    assert "30.1 s" in first
    assert "HCCL_CONNECT_TIMEOUT=600" in second
    monkeypatch.setenv("HCCL_RDMA_TIMEOUT", "5")
    monkeypatch.setenv("HCCL_CONNECT_TIMEOUT", "no number")
    assert sets_defaults(1.0) == []
