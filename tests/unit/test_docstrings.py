"""The examples in docstrings do what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from types import ModuleType

import pytest

import llm_datadist

PUBLIC = sorted(info.name for info in pkgutil.iter_modules(llm_datadist.__path__) if not info.name.startswith("_"))

# Modules of public names, except an enumeration without behaviour and a handle that only a transfer to a peer makes.
SHOWN = {getattr(llm_datadist, name).__module__.partition(".")[2] for name in llm_datadist.__all__}
SHOWN -= {"roles", "cache_task"}
SHOWN |= {"cache_manager", "device_copies", "introspection", "layer_range", "local_copy_calls", "registration_calls"}
SHOWN.add("views")


def find_examples(module: ModuleType) -> list[doctest.DocTest]:
    return [test for test in doctest.DocTestFinder().find(module) if test.examples]


def failures(tests: list[doctest.DocTest]) -> str:
    """Run examples; give the report on those that fail."""
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE, verbose=False)
    report: list[str] = []
    for test in tests:
        runner.run(test, out=report.append)
    return "".join(report)


@pytest.mark.parametrize("name", PUBLIC)
def test_the_examples_of_a_module_run(name: str) -> None:
    tests = find_examples(importlib.import_module(f"llm_datadist.{name}"))
    assert tests or name not in SHOWN, f"llm_datadist.{name} has no example"
    assert failures(tests) == ""
    assert llm_datadist.LLMDataDist.llm_engine_instance is None


def test_a_wrong_example_is_reported() -> None:
    module = ModuleType("wrong", ">>> 1 + 1\n3\n")
    assert "Expected:\n    3\nGot:\n    2" in failures(find_examples(module))


def test_every_module_with_public_names_is_looked_at() -> None:
    assert set(PUBLIC) >= SHOWN
