"""Run the benchmarks and print a table, or JSON for machines."""

from __future__ import annotations

import json
import socket

import click
from rich.console import Console
from rich.table import Table

from llm_datadist import LLMClusterInfo, LLMDataDist, LLMRole, LLMStatusCode
from llm_datadist.cluster.local import LocalGroup, LocalWorker

from .prompt_process import CLUSTER, new_datadist, serve
from .pulls import Decoder, Measurement, measure_memcpy

WAIT_S = 60.0
HOLD_S = 4


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of a table.")
def main(as_json: bool) -> None:
    """Measure pulls between two processes of this host; the prompt idle, then with its interpreter lock held."""
    with LocalGroup() as group:
        port = free_port()
        worker = group.start("prompt", serve, port)
        answer(worker)
        datadist = new_datadist(LLMRole.DECODER, CLUSTER + 1)
        try:
            link(datadist, port)
            decoder = Decoder(datadist.kv_cache_manager)
            results = {"prompt idle": [measure_memcpy(), *decoder.measure_all()]}
            for way in ("c call", "python loop"):
                worker.connection.send(("hold", way, HOLD_S))
                answer(worker)
                results[f"prompt holds its lock in a {way}"] = list(decoder.measure_all())
                if worker.connection.poll():
                    raise click.ClickException("the prompt let its lock go before the measurement ended")
                answer(worker)
            worker.connection.send(None)
            worker.wait(WAIT_S)
        finally:
            datadist.finalize()
    if as_json:
        print(json.dumps({state: [as_dict(item) for item in items] for state, items in results.items()}, indent=2))
    else:
        show(results)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def answer(worker: LocalWorker) -> object:
    if not worker.connection.poll(WAIT_S):
        raise click.ClickException("the prompt process does not answer")
    return worker.connection.recv()


def link(datadist: LLMDataDist, port: int) -> None:
    info = LLMClusterInfo()
    info.remote_cluster_id = CLUSTER
    info.append_local_ip_info("127.0.0.1", 0)
    info.append_remote_ip_info("127.0.0.1", port)
    overall, _ = datadist.link_clusters([info])
    if overall != LLMStatusCode.LLM_SUCCESS:
        raise click.ClickException(f"linking failed: {overall}")


def as_dict(item: Measurement) -> dict[str, object]:
    return {
        "name": item.name,
        "bytes": item.nbytes,
        "runs": len(item.seconds),
        "median_us": round(item.median_us, 2),
        "p99_us": round(item.p99_us, 2),
        "gb_per_s": round(item.gb_per_s, 2),
    }


def show(results: dict[str, list[Measurement]]) -> None:
    console = Console()
    for state, items in results.items():
        table = Table(title=state, title_justify="left")
        table.add_column("operation")
        for column in ("runs", "median us", "p99 us", "GB/s"):
            table.add_column(column, justify="right")
        for item in items:
            table.add_row(
                item.name, str(len(item.seconds)), f"{item.median_us:.1f}", f"{item.p99_us:.1f}", f"{item.gb_per_s:.2f}"
            )
        console.print(table)


if __name__ == "__main__":
    main()
