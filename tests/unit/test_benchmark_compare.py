"""The comparison of two result files of the benchmarks, with files that are made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks.compare import compare, main
from benchmarks.measurement import Row, Target
from benchmarks.results import as_document, save


def steady(median: float, spread: float = 0.01) -> list[float]:
    return [median * (1 + spread * step / 4) for step in range(-4, 5)]


def document(*rows: Row) -> dict[str, Any]:
    return json.loads(json.dumps(as_document(rows)))


def changes_of(old: Row, new: Row) -> list[str]:
    words = {(True, False): "slower", (False, True): "faster", (False, False): "same"}
    return [words[change.slower, change.faster] for change in compare(document(old), document(new))]


@pytest.mark.parametrize(
    ("new", "word"), [(100.0, "same"), (109.0, "same"), (115.0, "slower"), (92.0, "same"), (85.0, "faster")]
)
def test_steady_runs(new: float, word: str) -> None:
    assert changes_of(Row("pulls", "a", steady(100.0)), Row("pulls", "a", steady(new))) == [word]


def test_what_is_spread_may_differ_more() -> None:
    wide = 0.4
    assert changes_of(Row("pulls", "a", steady(100.0, wide)), Row("pulls", "a", steady(130.0, wide))) == ["same"]
    assert changes_of(Row("pulls", "a", steady(100.0, wide)), Row("pulls", "a", steady(190.0, wide))) == ["slower"]


def test_a_slow_machine_is_no_slow_library() -> None:
    old = Row("pulls", "a", steady(100.0), limit_us=90.0)
    assert changes_of(old, Row("pulls", "a", steady(200.0), limit_us=180.0)) == ["same"]
    assert changes_of(old, Row("pulls", "a", steady(100.0), limit_us=45.0)) == ["slower"]


def test_rows_of_one_file_alone_are_left_out() -> None:
    both = Row("pulls", "a", steady(5.0))
    old = document(both, Row("pulls", "only there", steady(5.0)))
    new = document(Row("links", "a", steady(5.0)), both)
    assert [change.topic for change in compare(old, new)] == ["pulls"]


def test_rows_of_another_unit_are_left_out() -> None:
    assert changes_of(Row("links", "a", [1.0], unit="s"), Row("links", "a", [1000.0], unit="ms")) == []


def test_exit_status(tmp_path: Path) -> None:
    old = save(document(Row("pulls", "a", steady(100.0))), tmp_path / "old.json")
    slow = save(document(Row("pulls", "a", steady(150.0))), tmp_path / "slow.json")
    run = CliRunner().invoke
    result = run(main, [str(old), str(slow)])
    assert result.exit_code == 1
    assert "x 1.50" in result.output
    assert "1 rows compared: 1 slower, 0 faster" in result.output
    assert run(main, [str(slow), str(old)]).exit_code == 0
    assert run(main, [str(old), str(old)]).exit_code == 0


def test_a_file_without_results(tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text("[]")
    result = CliRunner().invoke(main, [str(other), str(other)])
    assert result.exit_code == 2
    assert "holds no results" in result.output


def test_a_row_in_json() -> None:
    target = Target("of the limit", 0.95, 0.9, at_least=True)
    row = Row("pulls", "a", [100.0, 200.0, 300.0], nbytes=10**6, limit_us=190.0, targets=(target,))
    found = document(row)["rows"][0]
    assert (found["runs"], found["median"], found["gb_per_s"]) == (3, 200.0, 5.0)
    assert found["targets"] == [{"what": "of the limit", "value": 0.95, "relation": ">=", "bound": 0.9, "met": True}]


def test_targets() -> None:
    assert Target("us", 5.0, 5.0, at_least=False).met
    assert not Target("us", 5.1, 5.0, at_least=False).met
    assert not Target("x NIXL", 3.9, 4.0, at_least=True).met
