"""The examples in docstrings of the cluster's launching half do what they say."""

from __future__ import annotations

import importlib

import pytest

from tests.unit.test_docstrings import failures, find_examples


@pytest.mark.parametrize("name", ["cluster_file", "held_ports", "rank_environment", "role_assignment"])
def test_the_examples_of_a_module_run(name: str) -> None:
    tests = find_examples(importlib.import_module(f"llm_datadist.cluster.{name}"))
    assert tests
    assert failures(tests) == ""
