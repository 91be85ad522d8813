"""The command ``llm-datadist cluster-file``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from llm_datadist.cluster.cluster_file import parse_cluster_file
from llm_datadist.tools.cluster_file import cluster_file
from tests.unit.test_cluster_rank_table import SUPER_PODS

EXAMPLE = Path(__file__).parents[2] / "examples" / "launchers" / "cluster.yaml"


def run(*arguments: str, text: str | None = None) -> str:
    ended = CliRunner().invoke(cluster_file, arguments, input=text, catch_exceptions=False)
    assert ended.exit_code == 0, ended.output
    return ended.output


def test_check() -> None:
    lines = run("check", str(EXAMPLE)).splitlines()
    assert lines[0] == "rank 0: cluster 1, PROMPT, devices 0 of node-a, listens at 192.0.2.17:26000"
    assert lines[5] == "rank 5: cluster 6, DECODER, devices 2 of node-b"
    assert len(lines) == 6


def test_there_and_back() -> None:
    written = run("from-rank-table", "-", "--roles", "prompts=1", "--port", "26000", text=json.dumps(SUPER_PODS))
    assert [cluster.cluster_id for cluster in parse_cluster_file(written).clusters] == [1, 2, 3]
    assert json.loads(run("to-rank-table", "-", text=written)) == SUPER_PODS
    assert json.loads(run("to-rank-table", "-", "--version", "1.0", text=written))["version"] == "1.0"


@pytest.mark.parametrize(
    ("arguments", "text", "message"),
    [
        (["check", "-"], "clusters: 1", "<stdin>:1: clusters is 1, should be a list"),
        (["to-rank-table", "-"], "clusters: [{cluster_id: 1, role: MIX}]", "cluster 1 has no server_id"),
        (["from-rank-table", "-", "--roles", "prompts=1"], json.dumps(SUPER_PODS), "listen_port is None"),
    ],
)
def test_what_cannot_be_used(arguments: list[str], text: str, message: str) -> None:
    ended = CliRunner().invoke(cluster_file, arguments, input=text)
    assert ended.exit_code == 1
    assert f"llm-datadist cluster-file: {message}" in ended.output
