"""Make docs/conformance.md from the results of the conformance tests.

``python -m tests.conformance.report RESULTS TABLE`` reads what ``pytest --junit-xml RESULTS tests/conformance`` wrote.
The exit status is 1 if a line of the checklist failed or has no test.
"""

from __future__ import annotations

import argparse
import re
import sys
import xml.etree.ElementTree as ElementTree
from bisect import bisect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.conformance.backends import BACKENDS, MEMORY_BACKENDS, Backend

# First line of each topic of the checklist.
TOPICS = {
    1: "package",
    9: "enumerations and numbers",
    20: "exceptions",
    25: "validators",
    30: "LLMConfig",
    49: "LLMClusterInfo",
    55: "LLMDataDist without a peer",
    76: "CacheDesc and keys",
    94: "KvCache",
    101: "allocation",
    121: "deallocation, removal, local reading",
    127: "copy_cache, copy_blocks",
    136: "swap_blocks",
    141: "linking",
    166: "pull_cache",
    197: "pull_blocks",
    205: "layer-wise transfer",
    227: "switch_role",
    234: "cache-manager mode",
    251: "Tensor",
}
LINES = range(1, 256)

HEAD = """\
# Conformance

Each line of the checklist of the documented interface has its own tests; `pytest -k C042` runs those of line 42. This
table is made by `make conformance` from the results of the tests.

{passed} of {total} lines pass, on {backends}. Those of the cache-manager mode that move memory which programs have
registered pass on each way to it: {memory}.

Ascend stands for the simulator of this project, see [Ascend NPUs](ascend.md). Its devices let the host look into their
memory here, since the tests look at caches by `tensor_view`; hardware does not. A test that is left out on one of the
backends has its reason in the remark.

| line | topic | what is tested | status | remark |
| --- | --- | --- | --- | --- |
"""


@dataclass
class Result:
    """What the tests of one line came to."""

    names: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    passed: int = 0

    def add(self, name: str, remark: str | None, case: ElementTree.Element) -> None:
        what = re.sub(r"^test_C\d+_", "", name.partition("[")[0]).replace("_", " ")
        if what not in self.names:
            self.names.append(what)
        if remark and remark not in self.remarks:
            self.remarks.append(remark)
        skipped = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            self.failed.append(f"{name} failed")
        elif skipped is not None:
            self.remarks.append(f"Left out on {name.partition('[')[2].rstrip(']')}: {skipped.get('message')}.")
        else:
            self.passed += 1

    @property
    def status(self) -> str:
        if not self.names:
            return "no test"
        return "passed" if self.passed and not self.failed else "failed"


def read_results(path: Path) -> tuple[dict[int, Result], set[str]]:
    """Give the result of each line, and the names of the backends."""
    results = {number: Result() for number in LINES}
    backends = set()
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        properties = {entry.get("name"): entry.get("value") for entry in case.iter("property")}
        line, name = properties.get("line"), case.get("name", "")
        if line is None:
            continue
        results[int(line[1:])].add(name, properties.get("remark"), case)
        backends.update(str(backend) for backend in MEMORY_BACKENDS if str(backend) in name)
    return results, backends


def spans(numbers: Iterable[int]) -> str:
    """Write numbers as spans: 19, 45-48."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def names_of(backends: Iterable[Backend], seen: set[str]) -> str:
    """Name those of the backends that tests ran on."""
    return ", ".join(f"`{backend}`" for backend in backends if str(backend) in seen)


def table(results: dict[int, Result], backends: set[str]) -> Iterator[str]:
    passed = sum(result.status == "passed" for result in results.values())
    yield HEAD.format(
        passed=passed,
        total=len(results),
        backends=names_of(BACKENDS, backends),
        memory=names_of(MEMORY_BACKENDS, backends),
    )
    starts = sorted(TOPICS)
    for number, result in results.items():
        topic = TOPICS[starts[bisect(starts, number) - 1]]
        remark = " ".join([*result.remarks, *result.failed])
        yield f"| C{number:03} | {topic} | {'; '.join(result.names)} | {result.status} | {remark} |\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the table of conformance from the results of pytest.")
    parser.add_argument("results", type=Path, help="file that pytest --junit-xml wrote")
    parser.add_argument("table", type=Path, help="file to write, in markdown")
    arguments = parser.parse_args()
    results, backends = read_results(arguments.results)
    arguments.table.write_text("".join(table(results, backends)))
    wrong = [number for number, result in results.items() if result.status != "passed"]
    if wrong:
        print(f"lines that do not pass: {spans(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
