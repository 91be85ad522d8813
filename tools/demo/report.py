"""The result of a run: a table, the pools, the verdict; or one JSON document."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from llm_datadist.tools.ascend_simulator import NOTICE
from llm_datadist.tools.demo.outcome import HOST_MEMORY, SIMULATOR, Outcome, RequestRecord

# Title and least width of each column. Long titles wrap, numbers never do, and the table fits a terminal of 80 columns.
_COLUMNS = {
    "#": 2,
    "prompt tokens": 6,
    "prefill ms": 7,
    "KV bytes": 10,
    "pull ms": 6,
    "GB/s": 5,
    "first decoded token ms": 7,
    "tokens/s": 8,
    "same": 4,
}


def print_report(console: Console, outcome: Outcome) -> None:
    """Print the table, the level of both pools, and the verdict."""
    where = "" if outcome.device == HOST_MEMORY else f", caches on {outcome.device}"
    table = Table(title=f"mode {outcome.mode}{where}, {outcome.seconds:.0f} s", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column, width in _COLUMNS.items():
        table.add_column(column, justify="right", min_width=width)
    for record in outcome.records:
        table.add_row(*_row(record))
    console.print(table)
    console.print("First decoded token: since the start of its prefill. Same: as in one process.")
    if outcome.device != HOST_MEMORY:
        print_device(console, outcome)
    for name, level in sorted(outcome.pools.items(), reverse=True):
        console.print(
            f"KV pool of the {name} process: {level.used:,} bytes used at the end, {level.peak:,} at the peak, "
            f"{level.capacity:,} in all."
        )
    console.print(verdict(outcome), style="bold green" if outcome.passed else "bold red")


def print_device(console: Console, outcome: Outcome) -> None:
    """Print what the KV took on its way through two devices: in, over, out."""
    prefilled = [record.prefilled for record in outcome.records if record.prefilled]
    pulled = [record.pulled for record in outcome.records if record.pulled]
    copied_in, copied_out = sum(each.copy_s for each in prefilled), sum(each.copy_s for each in pulled)
    console.print(
        f"KV of all requests: {sum(each.nbytes for each in pulled):,} bytes, {copied_in * 1e3:.1f} ms from the host to"
        f" device 0, {sum(each.pull_s for each in pulled) * 1e3:.1f} ms over {pulled[0].transport} to device 1,"
        f" {copied_out * 1e3:.1f} ms to the host."
    )
    if outcome.device == SIMULATOR:
        console.print(NOTICE, style="bold yellow")


def verdict(outcome: Outcome) -> str:
    """Say in one line whether the run was right, and if not, why."""
    total = len(outcome.records)
    different = [f"#{record.request.number}" for record in outcome.records if not record.identical]
    if different:
        return (
            f"FAILED: {len(different)} of {total} answers differ from the model in one process: {', '.join(different)}"
        )
    if not outcome.pools_empty:
        return "FAILED: KV memory was not given back"
    logits = "and so are the logits, to the last bit" if outcome.same_logits else "though the logits differ slightly"
    return f"OK: all {total} answers are token for token those of the model in one process, {logits}"


def as_document(outcome: Outcome) -> dict[str, Any]:
    """Return the result as plain values for JSON."""
    return {
        "model": "SmolLM2-135M-Instruct",
        "mode": outcome.mode,
        "device": outcome.device,
        "max_new_tokens": outcome.max_new_tokens,
        "requests": [_request_document(record) for record in outcome.records],
        "pools": {
            name: {"capacity_bytes": level.capacity, "peak_bytes": level.peak, "used_bytes": level.used}
            for name, level in outcome.pools.items()
        },
        "seconds": round(outcome.seconds, 3),
        "identical": outcome.identical,
        "same_logits": outcome.same_logits,
        "passed": outcome.passed,
    }


def _row(record: RequestRecord) -> list[str]:
    prefilled, pulled = record.prefilled, record.pulled
    assert prefilled is not None
    assert pulled is not None
    return [
        str(record.request.number),
        str(record.prompt_tokens),
        f"{prefilled.prefill_s * 1e3:.0f}",
        f"{pulled.nbytes:,}",
        f"{pulled.pull_s * 1e3:.2f}",
        _number(record.gigabytes_per_s, 1),
        _number(_milliseconds(record.first_decoded_token_s), 0),
        _number(record.tokens_per_s, 1),
        "yes" if record.identical else "NO",
    ]


def _request_document(record: RequestRecord) -> dict[str, Any]:
    prefilled, pulled, answered = record.prefilled, record.pulled, record.answered
    assert prefilled is not None
    assert pulled is not None
    assert answered is not None
    return {
        "request": record.request.number,
        "prompt": record.request.prompt,
        "prompt_tokens": record.prompt_tokens,
        "prefill_ms": prefilled.prefill_s * 1e3,
        "kv_bytes": pulled.nbytes,
        "transport": pulled.transport,
        "prefilled_by": record.prefilled_by or "prefill",
        "decoded_by": record.decoded_by or "decode",
        "attempts": record.attempts,
        "pull_ms": pulled.pull_s * 1e3,
        "copy_in_ms": prefilled.copy_s * 1e3,
        "copy_out_ms": pulled.copy_s * 1e3,
        "pull_gigabytes_per_s": record.gigabytes_per_s,
        "first_decoded_token_ms": _milliseconds(record.first_decoded_token_s),
        "tokens_per_s": record.tokens_per_s,
        "token_ids": answered.token_ids,
        "text": answered.text,
        "identical": record.identical,
        "same_logits": record.same_logits,
    }


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
