"""What `import llm_datadist` gives, and what it does and does not do."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest

import llm_datadist

NAMES = {
    "LLMClusterInfo",
    "LLMStatusCode",
    "LLMException",
    "LLMRole",
    "LlmConfig",
    "LLMConfig",
    "TensorDesc",
    "Tensor",
    "DataType",
    "Status",
    "KvCacheManager",
    "CacheDesc",
    "CacheKey",
    "CacheKeyByIdAndIndex",
    "KvCache",
    "Cache",
    "BlocksCacheKey",
    "LLMDataDist",
    "Placement",
    "LayerSynchronizer",
    "TransferConfig",
    "CacheTask",
    "TransferWithCacheKeyConfig",
    "RegisterMemStatus",
    "Memtype",
    "MemInfo",
}


def run(code: str, **variables: str) -> str:
    """Run code in a fresh interpreter that has none of this library's variables but those given."""
    environment = {
        key: value for key, value in os.environ.items() if key not in ("AUTO_USE_UC_MEMORY", "ASCEND_GLOBAL_LOG_LEVEL")
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**environment, **variables},
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr == ""
    return done.stdout


def test_the_package_has_the_documented_names() -> None:
    assert set(llm_datadist.__all__) >= NAMES
    for name in llm_datadist.__all__:
        assert getattr(llm_datadist, name).__module__.startswith("llm_datadist.")
    everything: dict[str, object] = {}
    exec("from llm_datadist import *", everything)
    assert everything.keys() >= NAMES


def test_one_class_has_two_names() -> None:
    assert llm_datadist.LLMConfig is llm_datadist.LlmConfig
    assert llm_datadist.LlmConfig.__name__ == "LlmConfig"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute"):
        llm_datadist.no_such_name  # noqa: B018


def test_the_import_sets_a_variable_that_is_absent() -> None:
    code = "import llm_datadist, os, sys; sys.stdout.write(os.environ['AUTO_USE_UC_MEMORY'])"
    assert run(code) == "0"
    assert run(code, AUTO_USE_UC_MEMORY="1") == "1"


def test_the_import_is_light() -> None:
    code = """
import os, sys, threading
before = os.listdir("/proc/self/fd")
from llm_datadist import *
heavy = ("numpy", "zmq", "msgpack", "torch", "llm_datadist._core", "llm_datadist.engine.engine")
assert not [name for name in heavy if name in sys.modules]
assert threading.active_count() == 1
assert os.listdir("/proc/self/fd") == before
"""
    assert run(code) == ""


def test_the_exit_handler_does_nothing_without_an_instance() -> None:
    from llm_datadist.datadist import _shutdown_handler

    assert llm_datadist.LLMDataDist.llm_engine_instance is None
    _shutdown_handler()


LOG_ALL = """
import logging
import llm_datadist
for level in (10, 20, 30, 40):
    logging.getLogger("llm_datadist.part").log(level, "level %d", level)
"""


@pytest.mark.parametrize(
    ("variable", "lowest"),
    [("0", logging.DEBUG), ("1", logging.INFO), ("2", logging.WARNING), ("3", logging.ERROR), ("x", logging.ERROR)],
)
def test_messages_go_to_standard_output_from_the_wanted_level_on(variable: str, lowest: int) -> None:
    printed = run(LOG_ALL, ASCEND_GLOBAL_LOG_LEVEL=variable)
    assert [level for level in (10, 20, 30, 40) if f"level {level}" in printed] == list(range(lowest, 50, 10))


def test_without_the_variable_only_errors_are_printed() -> None:
    assert [level for level in (10, 20, 30, 40) if f"level {level}" in run(LOG_ALL)] == [40]


def test_a_program_that_sets_up_logging_decides_where_messages_go() -> None:
    code = "import logging, sys; logging.basicConfig(stream=sys.stdout, format='mine: %(message)s')\n" + LOG_ALL
    assert run(code) == "mine: level 40\n"
