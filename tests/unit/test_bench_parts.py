"""The parts of ``llm-datadist bench`` that need no second process."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from llm_datadist.tools.bench.byte_size import size, size_text
from llm_datadist.tools.bench.case import Case, all_cases
from llm_datadist.tools.bench.command import bench
from llm_datadist.tools.bench.latency import PERCENTILES, Latency

KIB, MIB = 1 << 10, 1 << 20
CASE = Case(32 * KIB, 2, None)


# ---- percentiles


def latency(*sorted_us: float) -> Latency:
    return Latency(CASE, sorted_us)


def test_percentiles_of_a_thousand_runs() -> None:
    thousand = latency(*range(1, 1001))
    assert [thousand.percentile(percent) for percent in PERCENTILES] == [500, 900, 990, 999]


def test_a_percentile_is_a_time_that_was_measured() -> None:
    assert latency(1.0, 7.0).percentile(50.0) == 1.0
    assert latency(1.0, 7.0, 9.0).percentile(50.0) == 7.0


@pytest.mark.parametrize(("percent", "least"), [(50.0, 1), (90.0, 10), (99.0, 100), (99.9, 1000)])
def test_percentiles_need_enough_runs(percent: float, least: int) -> None:
    assert latency(*range(least)).percentile(percent) is not None
    if least > 1:
        assert latency(*range(least - 1)).percentile(percent) is None


def test_speed_is_that_of_the_median_run() -> None:
    assert Latency(Case(10**6, 1, None), [50.0, 100.0, 900.0]).gb_per_s == 10.0


# ---- sizes


@pytest.mark.parametrize(
    ("text", "nbytes"), [("4096", 4096), ("64K", 64 * KIB), ("64k", 64 * KIB), ("1MiB", MIB), ("2GB", 2 << 30)]
)
def test_sizes(text: str, nbytes: int) -> None:
    assert size(text) == nbytes


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5M", "K", "1T", "many"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is no size, should be like"):
        size(text)


@pytest.mark.parametrize(
    ("nbytes", "text"), [(100, "100 B"), (KIB, "1 KiB"), (1536, "1536 B"), (MIB, "1 MiB"), (3 << 29, "1536 MiB")]
)
def test_size_text(nbytes: int, text: str) -> None:
    assert size_text(nbytes) == text


# ---- cases


def test_cases_of_sizes_and_blocks() -> None:
    cases = list(all_cases([32 * KIB, MIB], [16 * KIB, 64 * KIB], tensors=2, contiguous=True))
    assert [(case.nbytes, case.block_bytes) for case in cases] == [
        (32 * KIB, None),
        (32 * KIB, 16 * KIB),
        (MIB, None),
        (MIB, 16 * KIB),
        (MIB, 64 * KIB),
    ]
    assert cases[-1].blocks == 8
    assert cases[-1].desc.shape == (8, 64 * KIB)
    assert cases[0].desc.shape == (1, 16 * KIB)


def test_every_block_is_moved_once() -> None:
    source, target = Case(MIB, 2, 4 * KIB).block_lists()
    assert sorted(source) == sorted(target) == list(range(128))
    assert source != target


@pytest.mark.parametrize(
    ("sizes", "blocks", "tensors", "message"),
    [([33], [], 2, "cannot be spread over 2 tensors"), ([96 * KIB], [32 * KIB], 2, "cannot be cut into blocks")],
)
def test_sizes_that_leave_a_rest(sizes: list[int], blocks: list[int], tensors: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(all_cases(sizes, blocks, tensors, contiguous=True))


# ---- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "33"], "33 bytes cannot be spread over 2 tensors"),
        (["--size", "1K", "--block", "64K", "--no-contiguous"], "nothing to measure"),
        (["--size", "many"], "is no size"),
        (["--threads", "0"], "--threads"),
        (["--direction", "sideways"], "--direction"),
    ],
)
def test_bad_options(options: list[str], message: str) -> None:
    result = CliRunner().invoke(bench, options)
    assert result.exit_code == 2
    assert message in result.output
