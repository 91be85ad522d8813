"""Package: names, modules, and what an import does."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable

import pytest

import llm_datadist
from llm_datadist import LLMRole

NAMES = set(
    "LLMClusterInfo LLMStatusCode LLMException LLMRole LlmConfig LLMConfig TensorDesc Tensor DataType Status "  # noqa: SIM905
    "KvCacheManager CacheDesc CacheKey CacheKeyByIdAndIndex KvCache Cache BlocksCacheKey LLMDataDist Placement "
    "RegisterMemStatus LayerSynchronizer TransferConfig CacheTask TransferWithCacheKeyConfig Memtype MemInfo".split()
)
MODULES = {
    "status": "LLMStatusCode LLMException Status",
    "configs": "LLMRole LLMClusterInfo LlmConfig",
    "data_type": "DataType",
    "tensor": "Tensor TensorDesc",
    "v2.llm_types": """CacheDesc CacheKey CacheKeyByIdAndIndex BlocksCacheKey KvCache Cache Placement LayerSynchronizer
    TransferConfig TransferWithCacheKeyConfig CacheTask RegisterMemStatus Memtype MemInfo""",
    "v2.llm_datadist": "LLMDataDist",
    "v2.kv_cache_manager": "KvCacheManager",
}


def run_python(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "AUTO_USE_UC_MEMORY"}
    return subprocess.run(
        [sys.executable, "-c", program], env={**inherited, **environment}, capture_output=True, text=True, timeout=60
    )


def test_C001_every_name_can_be_imported() -> None:
    for name in NAMES:
        assert getattr(llm_datadist, name).__name__
        assert name in llm_datadist.__all__


def test_C002_one_configuration_class_with_two_names() -> None:
    assert llm_datadist.LLMConfig is llm_datadist.LlmConfig


@pytest.mark.parametrize("module", MODULES)
def test_C003_each_class_exists_once(module: str) -> None:
    found = importlib.import_module(f"llm_datadist.{module}")
    for name in MODULES[module].split():
        assert getattr(found, name) is getattr(llm_datadist, name)


def test_C004_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute"):
        llm_datadist.no_such_name  # noqa: B018


def test_C005_the_import_sets_a_variable_that_is_absent() -> None:
    program = "import os, llm_datadist; print(os.environ['AUTO_USE_UC_MEMORY'])"
    assert run_python(program).stdout == "0\n"
    assert run_python(program, AUTO_USE_UC_MEMORY="1").stdout == "1\n"


def test_C006_the_import_starts_nothing() -> None:
    program = """if True:
        import os, sys, threading, llm_datadist
        assert threading.active_count() == len(os.listdir("/proc/self/task")) == 1
        names = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if int(fd) > 2
                 and os.path.exists(f"/proc/self/fd/{fd}")]
        assert not any(name.startswith("socket:") for name in names), names
        assert not {"acl", "torch", "torch_npu"} & set(sys.modules)
    """
    ended = run_python(program)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_C007_the_exit_handler_without_an_instance() -> None:
    from llm_datadist.v2.llm_datadist import _shutdown_handler

    assert llm_datadist.LLMDataDist.llm_engine_instance is None
    assert _shutdown_handler() is None


def test_C008_a_process_may_end_without_finalize(options: Callable[..., dict[str, str]]) -> None:
    program = f"""if True:
        from llm_datadist import CacheDesc, CacheKey, DataType, LLMDataDist, LLMRole
        prompt = LLMDataDist(LLMRole.PROMPT, 1)
        prompt.init({options(LLMRole.PROMPT)!r})
        cache = prompt.kv_cache_manager.allocate_cache(CacheDesc(2, (4, 64), DataType.DT_FLOAT16), [CacheKey(1, 2)])
    """
    before = set(os.listdir("/dev/shm"))
    ended = run_python(program)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert not {name for name in set(os.listdir("/dev/shm")) - before if "llm" in name}
