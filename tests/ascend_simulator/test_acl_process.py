"""From aclInit to aclFinalize: counts, codes, texts, knobs, forks, and which names each variant exports."""

from __future__ import annotations

import ctypes
import os

import pytest

from tests.ascend_simulator import build
from tests.ascend_simulator.acl import Acl
from tests.ascend_simulator.programs import SANITIZE, in_thread


def init_and_finalize(acl: Acl):
    before = acl.aclrtSetDevice(0)
    text = acl.message()
    codes = [acl.aclInit(None), acl.aclInit(None), acl.aclrtSetDevice(0), acl.aclrtResetDevice(0)]
    return before, text, codes, [acl.aclFinalize(), acl.aclFinalize(), acl.aclrtSetDevice(0)]


def test_calls_before_and_after(program):
    before, text, codes, after = program().call(init_and_finalize)
    assert (before, codes, after) == (100001, [0, 100002, 0, 0], [0, 100037, 100001])
    assert "aclrtSetDevice" in text


def test_each_initialisation_is_a_reference(program):
    assert program().call(count_references) == [(0, 1), (0, 0), 100037]


def count_references(acl: Acl):
    acl.ok("aclInit", None)
    assert acl.aclInit(None) == 100002
    left = ctypes.c_uint64()
    return [(acl.aclFinalizeReference(ctypes.byref(left)), left.value) for _ in range(2)] + [acl.aclFinalize()]


def read_messages(acl: Acl):
    acl.start()
    acl.aclrtMalloc(None, 1, 0)
    texts = [in_thread(acl.message), acl.message(), acl.message()]
    return texts, [acl.aclrtPeekAtLastError(0), acl.aclrtGetLastError(0), acl.aclrtGetLastError(0)]


def test_texts_belong_to_the_thread_and_are_read_once(program):
    texts, codes = program().call(read_messages)
    assert texts == ["", "[100000] aclrtMalloc: devPtr is null", ""]
    assert codes == [100000, 100000, 0]


def init_with(acl: Acl, path: str):
    code = acl.aclInit(path.encode())
    acl.aclrtMalloc(None, 1, 0)
    return code, in_thread(acl.message)


@pytest.mark.parametrize(
    ("content", "code", "shared"),
    [
        ("{}", 0, False),
        ('{"err_msg_mode": "1"}', 0, True),
        ("[]", 100003, False),
        ('{"err_msg_mode": 7}', 100003, False),
    ],
)
def test_configuration(program, tmp_path, content, code, shared):
    path = tmp_path / "acl.json"
    path.write_text(content)
    got, text = program(MISUSE="error").call(init_with, str(path))
    assert (got, bool(text)) == (code, shared)


def test_configuration_that_is_not_there(program):
    assert program().call(init_with, "/nonexistent/acl.json")[0] == 100003


def init(acl: Acl):
    return acl.aclInit(None), acl.message()


@pytest.mark.parametrize(
    ("knob", "value"),
    [
        ("DEVICES", "eight"),
        ("DEVICES", "65"),
        ("TIME_SCALE", "0"),
        ("HCCS", "0-1;2-3"),
        ("HUGE_OFFSET", "63"),
        ("MISUSE", "warn"),
        ("LINK", "ethernet"),
        ("WORLD", "a/b"),
        ("HBMMIB", "64"),
        ("FAULTS", "aclrtMallocs=code(1)"),
        ("FAULTS", "aclGetRecentErrMsg=code(1)"),
        ("FAULTS", "exec.copies=drop"),
        ("FAULTS", "exec.copy=dropped"),
        ("FAULTS", "exec.copy=code"),
        ("FAULTS", "exec.copy=code(0)"),
        ("FAULTS", "exec.copy=delay(1"),
        ("FAULTS", "exec.copy#0=drop"),
        ("FAULTS", "exec.copy%2=drop"),
        ("FAULTS", "exec.copy"),
        ("FAULTS", "exec.copy=eof"),
        ("FAULTS", "aclrtMemcpy=drop"),
        ("FAULTS", "exec.event=half"),
    ],
)
def test_what_cannot_be_understood_is_refused(program, knob, value):
    code, text = program(**{knob: value}).call(init)
    assert code == 100003
    assert "LLMDD_SIM_" in text


def set_knobs(acl: Acl):
    early = acl.llmdd_sim_set(b"MISUSE", b"log")
    acl.ok("aclInit", None)
    return early, [
        acl.llmdd_sim_set(name, value)
        for name, value in [
            (b"MIN_DELAY_US", b"1"),
            (b"LLMDD_SIM_FAULTS", b"exec.copy=drop"),
            (b"DEVICES", b"1"),
            (b"NONE", b"1"),
        ]
    ]


def test_knobs_at_run_time(program):
    assert program().call(set_knobs) == (100001, [0, 0, 107000, 100003])


def use_in_fork(acl: Acl):
    acl.start()
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.write(write, repr((acl.aclrtSetDevice(0), acl.aclInit(None), acl.message()[:20])).encode())
        os._exit(0)
    os.waitpid(child, 0)
    return os.read(read, 200).decode(), acl.aclrtSetDevice(0)


@pytest.mark.skipif(SANITIZE == "thread", reason="ThreadSanitizer does not follow a fork with threads")
def test_forked_child_is_refused(program):
    assert program(MISUSE="error").call(use_in_fork) == ("(107000, 107000, '[107000] aclInit: th')", 0)


def versions(acl: Acl):
    acl.ok("aclInit", None)
    text = ctypes.create_string_buffer(128)
    acl.ok("aclsysGetVersionStr", b"runtime", text)
    return text.value, acl.llmdd_sim_version(), acl.aclrtGetSocName()


def test_it_says_that_it_is_a_simulator(program):
    text, version, soc = program(SOC="Ascend910_9391").call(versions)
    assert b"simulator" in text
    assert b"simulator" in version
    assert soc == b"Ascend910_9391"


def exported(acl: Acl, names: list[str]):
    return [name for name in names if hasattr(acl, name)]


NAMES = [
    "aclInit",
    "aclrtCreateEvent",
    "aclrtCreateEventExWithFlag",
    "aclrtMallocAlign32",
    "HcclSend",
    "HcclConfigGetInfo",
    "HcclBatchPut",
    "HcclRegisterGlobalMem",
    "llmdd_sim_version",
]


@pytest.mark.parametrize(
    ("variant", "missing"),
    [
        ("", []),
        ("acl_only", [name for name in NAMES if name.startswith("Hccl")]),
        ("no_onesided", ["HcclBatchPut", "HcclRegisterGlobalMem"]),
        ("old", ["aclrtCreateEventExWithFlag", "aclrtMallocAlign32", "HcclConfigGetInfo"]),
    ],
)
def test_exported_names(program, variant, missing):
    present = program(variant=variant).call(exported, [*NAMES, "sim_fail"])
    assert present == [name for name in NAMES if name not in missing]


def test_second_build_does_nothing():
    path = build.library("", SANITIZE)
    before = path.stat().st_mtime_ns
    assert build.library("", SANITIZE).stat().st_mtime_ns == before


def call_holding(acl: Acl):
    acl.ok("aclInit", None)
    return acl.aclrtSetDevice(0), acl.message()


def test_first_set_device_must_not_hold_the_interpreter(program):
    code, text = program(hold_interpreter=True, MISUSE="error").call(call_holding)
    assert code == 107000
    assert "interpreter lock" in text
