"""The functions of the vendor as the bindings declare and look them up, against the types of the public headers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

NATIVE = Path(__file__).resolve().parents[2] / "llm_datadist"
TABLE = Path(__file__).with_name("ascend_prototypes.h")

# Bytes. Other names are enumerations, of 4, or structures, which are passed by pointer only.
WIDTHS = {"size_t": 8, "uint64_t": 8, "int64_t": 8, "uint32_t": 4, "int32_t": 4, "int": 4, "float": 4}
WIDTHS.update(dict.fromkeys(["aclrtEventRecordedStatus", "aclrtStreamStatus", "HcclResult"], 4))
POINTERS = {"aclrtStream", "aclrtEvent", "aclrtContext", "aclrtNotify", "aclrtDrvMemHandle", "HcclComm"}

Shape = tuple[str, ...]


def shape_of(text: str) -> str:
    """What a type is for the machine: ``pointer to N``, where N are the bytes of what it points to, or bytes."""
    words = text.replace("*", " * ").replace("const", " ").split()
    name, stars = words[0], words.count("*")
    if name in POINTERS:
        stars += 1
        name = "void"
    if stars == 0:
        return str(WIDTHS.get(name, 4))
    if stars > 1:
        return "pointer to pointer"
    return f"pointer to {WIDTHS[name]}" if name in WIDTHS else "pointer"


def signature(result: str, arguments: str) -> Shape:
    given = [argument for argument in arguments.split(",") if argument.strip() not in ("", "void")]
    return shape_of(result), *(shape_of(argument) for argument in given)


def table() -> dict[str, Shape]:
    found = re.findall(r"^([\w *]+?)\b(\w+)\(([^)]*)\);$", TABLE.read_text(), re.MULTILINE)
    return {name: signature(result, arguments) for result, name, arguments in found}


def declared(module: str) -> dict[str, Shape]:
    text = (NATIVE / f"{module}.pxd").read_text()
    found = re.findall(r"^    ([\w ]+?\*?)\(\*(\w+)\)\(([^)]*)\) noexcept nogil$", text, re.MULTILINE)
    return {name: signature(result, arguments) for result, name, arguments in found}


@pytest.mark.parametrize(("module", "fewest"), [("_acl_runtime", 34), ("_hccl", 19)])
def test_every_function_is_declared_as_in_the_headers(module: str, fewest: int) -> None:
    wanted = table()
    functions = declared(module)
    assert len(functions) >= fewest, "the declarations are not found any more"
    for name, shape in functions.items():
        assert name in wanted, f"{name} is not a function of the vendor"
        assert shape == wanted[name], name


@pytest.mark.parametrize("module", ["_acl_runtime", "_hccl"])
def test_every_declared_function_is_looked_up_by_its_own_name(module: str) -> None:
    text = (NATIVE / f"{module}.pyx").read_text()
    found = re.findall(r'\.(?:require|accept)\("(\w+)", <void \*\*>&f\.(\w+)\)', text)
    assert all(name == slot for name, slot in found)
    assert sorted(name for name, _ in found) == sorted(declared(module))


@pytest.mark.parametrize("module", sorted(path.stem for path in NATIVE.glob("_*.pyx")))
def test_nothing_waits_without_a_limit(module: str) -> None:
    text = (NATIVE / f"{module}.pyx").read_text()
    for name in ("aclrtSynchronizeStream", "aclrtSynchronizeEvent", "aclrtSynchronizeDevice"):
        assert not re.search(rf"\b{name}\b", text)
    for name in ("aclrtResetDeviceForce", "aclFinalize", "aclrtSetStreamFailureMode"):
        assert name not in text, "it would take the device away from others of this process"


def test_the_comparison_sees_a_difference() -> None:
    assert signature("aclError ", "int32_t, int32_t* const") == signature("aclError ", "int32_t, int32_t *")
    assert signature("aclError ", "uint64_t") != signature("aclError ", "uint32_t")
    assert signature("aclError ", "void**, size_t") != signature("aclError ", "void*, size_t")
    assert signature("aclError ", "size_t*") != signature("aclError ", "uint32_t*")
    assert signature("aclError ", "void*, size_t") != signature("aclError ", "void*")
    assert signature("aclError ", "aclrtMemcpyKind") == signature("aclError ", "int32_t")
