"""The result of a measurement: a table, or one JSON document."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from llm_datadist.tools.bench.byte_size import size_text
from llm_datadist.tools.bench.latency import PERCENTILES, Latency
from llm_datadist.tools.bench.measuring import Plan, Result


def print_report(console: Console, plan: Plan, result: Result) -> None:
    """Print one line a case."""
    tensors = plan.cases[0].tensors
    title = f"{plan.direction}, {plan.memory} memory, {tensors} tensor{'s' * (tensors != 1)}, {result.transport}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("message", "in", "runs", *(f"p{percent:g} us" for percent in PERCENTILES), "GB/s"):
        table.add_column(column, justify="right", no_wrap=True)
    for latency in result.latencies:
        table.add_row(*_row(latency))
    console.print(table)
    console.print(f"One thread of this host copies {result.memcpy_gb_per_s:.1f} GB/s inside a process (memcpy).")


def as_document(plan: Plan, result: Result) -> dict[str, Any]:
    """Return the result as plain values for JSON."""
    return {
        "direction": plan.direction,
        "memory": plan.memory,
        "threads": plan.threads,
        "transport": result.transport,
        "memcpy_gb_per_s": round(result.memcpy_gb_per_s, 3),
        "cases": [_case_document(latency) for latency in result.latencies],
    }


def _row(latency: Latency) -> list[str]:
    case = latency.case
    shape = "one piece" if case.block_bytes is None else f"{case.blocks} x {size_text(case.block_bytes)}"
    times = [latency.percentile(percent) for percent in PERCENTILES]
    texts = ["-" if time is None else f"{time:,.1f}" for time in times]
    return [size_text(case.nbytes), shape, str(len(latency.sorted_us)), *texts, f"{latency.gb_per_s:.2f}"]


def _case_document(latency: Latency) -> dict[str, Any]:
    case = latency.case
    times = {f"p{percent:g}_us": latency.percentile(percent) for percent in PERCENTILES}
    return {
        "bytes": case.nbytes,
        "tensors": case.tensors,
        "block_bytes": case.block_bytes,
        "blocks": case.blocks,
        "runs": len(latency.sorted_us),
        **times,
        "gb_per_s": round(latency.gb_per_s, 3),
    }
