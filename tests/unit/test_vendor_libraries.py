"""How the vendor's libraries are found: by name, in the toolkit's folder, or where a variable says; and what if not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ASK = """
import sys
import llm_datadist
from llm_datadist import _acl, _hccl
from llm_datadist._shared_library import LibraryMissing
module = {"acl": _acl, "hccl": _hccl}[sys.argv[1]]
for _ in range(2):  # the outcome is kept
    try:
        print(module.load())
    except LibraryMissing as error:
        print(error.symbol, error)
"""


def required_names() -> list[str]:
    texts = [(ROOT / "llm_datadist" / f"{module}.pyx").read_text() for module in ("_acl_runtime", "_hccl")]
    return re.findall(r'\.require\("(\w+)"', "".join(texts))


def compile_library(path: Path, names: list[str], value: int = 0) -> Path:
    """A library whose functions do nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    source = path.with_suffix(".c")
    source.write_text("".join(f"int {name}(void) {{ return {value}; }}\n" for name in names))
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", path, source, f"-Wl,-soname,{path.name}"], check=True)
    return path


def ask(what: str, before: str = "", **variables: object) -> str:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("ASCEND_", "LLM_DATADIST_", "LD_LIBRARY"))}
    environment = {**clean, **{name: str(value) for name, value in variables.items()}}
    run = subprocess.run(
        [sys.executable, "-c", before + ASK, what],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 0, run.stderr
    first, second = run.stdout[: len(run.stdout) // 2], run.stdout[len(run.stdout) // 2 :]
    assert first == second
    return first


def test_without_any_library_the_error_names_what_was_tried() -> None:
    told = ask("acl")
    for part in (
        "libacl_rt.so: cannot open",
        "libascendcl.so: cannot open",
        "set_env.sh",
        "/usr/local/Ascend/cann/lib64/",
    ):
        assert part in told
    assert "libacl_rt.so" in ask("hccl"), "HCCL needs it first"


def test_a_missing_function_is_named(tmp_path: Path) -> None:
    names = [name for name in required_names() if name != "aclrtStreamAbort"]
    library = compile_library(tmp_path / "libacl_rt.so", names)
    told = ask("acl", LLM_DATADIST_ACL_LIBRARY=library)
    assert told.startswith("aclrtStreamAbort aclrtStreamAbort is missing in ")
    assert str(library) in told


def test_functions_that_may_be_missing_are_listed(tmp_path: Path) -> None:
    library = compile_library(tmp_path / "libacl_rt.so", required_names())
    told = ask("acl", LLM_DATADIST_ACL_LIBRARY=library)
    assert told.startswith(f"(('{library}',), (")
    assert "'aclrtMallocAlign32'" in told
    assert "'aclrtSetDevice'" not in told


def test_a_path_must_be_absolute(tmp_path: Path) -> None:
    compile_library(tmp_path / "libacl_rt.so", required_names())
    assert "not an absolute path" in ask("acl", LLM_DATADIST_ACL_LIBRARY="libacl_rt.so", ASCEND_HOME_PATH=tmp_path)
    assert "no/such.so: cannot open" in ask("acl", LLM_DATADIST_ACL_LIBRARY="/no/such.so")


def test_what_one_file_lacks_comes_from_its_neighbour(tmp_path: Path) -> None:
    names = required_names()
    first = compile_library(tmp_path / "lib64" / "libacl_rt.so", names[:5])
    second = compile_library(tmp_path / "lib64" / "libascendcl.so", names)
    told = ask("acl", ASCEND_HOME_PATH=tmp_path)
    assert told.startswith(f"(('{first}', '{second}'), (")


def test_the_older_name_alone_will_do(tmp_path: Path) -> None:
    library = compile_library(tmp_path / "lib64" / "libascendcl.so", required_names())
    assert ask("acl", ASCEND_HOME_PATH=tmp_path).startswith(f"(('{library}',), (")


def test_a_library_that_is_loaded_already_goes_before_another_toolkit(tmp_path: Path) -> None:
    loaded = compile_library(tmp_path / "one" / "lib64" / "libacl_rt.so", required_names())
    compile_library(tmp_path / "other" / "lib64" / "libacl_rt.so", required_names())
    before = f"import ctypes; ctypes.CDLL({str(loaded)!r})\n"
    assert ask("acl", before, ASCEND_HOME_PATH=tmp_path / "other").startswith(f"(('{loaded}',), (")


@pytest.mark.parametrize("split", [True, False])
def test_communicators_and_operators_may_be_in_one_file_or_two(tmp_path: Path, split: bool) -> None:
    names = required_names()
    operators = [name for name in names if name in ("HcclSend", "HcclRecv")]
    communicators = [name for name in names if name.startswith("Hccl") and name not in operators]
    compile_library(tmp_path / "lib64" / "libacl_rt.so", names)
    if split:
        compile_library(tmp_path / "lib64" / "libhcomm.so", communicators)
    compile_library(tmp_path / "lib64" / "libhccl.so", operators if split else names)
    told = ask("hccl", ASCEND_HOME_PATH=tmp_path)
    wanted = ("libhcomm.so", "libhccl.so") if split else ("libhccl.so", "libhccl.so")
    paths = re.findall(r"'([^']*\.so)'", told)
    assert tuple(Path(path).name for path in paths[:1] + paths[-1:]) == wanted
    assert "'HcclCommPrepare'" in told, "without it there are no one-sided transfers"


def test_an_operator_that_is_missing_is_named(tmp_path: Path) -> None:
    names = [name for name in required_names() if name != "HcclRecv"]
    library = compile_library(tmp_path / "libascend.so", names)
    variables = {f"LLM_DATADIST_{name}_LIBRARY": library for name in ("ACL", "HCOMM", "HCCL")}
    assert ask("hccl", **variables).startswith("HcclRecv HcclRecv is missing in ")
