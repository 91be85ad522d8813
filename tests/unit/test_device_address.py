"""The address of a device's network port: the file, the tool, and what happens when there is neither."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from llm_datadist.devices.ascend import device_address as module
from llm_datadist.devices.ascend.device_address import BadDeviceAddress, device_address

PATIENCE_S = 10.0
CONFIGURATION = """\
address_0=198.51.100.20
netmask_0=255.255.255.0
address_1 = 198.51.100.21
IPv6address_1=2001:db8::21
IPv6address_2=2001:DB8:0::22
address_3=0.0.0.0
address_10=198.51.100.30

# address_4=198.51.100.24
a line of something else
"""

MakeTool = Callable[[str], Path]


@pytest.fixture
def make_tool(tmp_path: Path) -> MakeTool:
    """Make a program in place of hccn_tool, of the body of a shell script; it notes its arguments."""

    def make(body: str) -> Path:
        tool = tmp_path / "hccn_tool"
        tool.write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/asked\n{body}\n')
        tool.chmod(0o755)
        return tool

    return make


def asked(tmp_path: Path) -> list[str]:
    return (tmp_path / "asked").read_text().splitlines()


@pytest.fixture(autouse=True)
def no_tool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hide an installed tool."""
    monkeypatch.setattr(module, "TOOL", "hccn_tool_that_is_not_there")
    monkeypatch.setattr(module, "TOOL_OF_DRIVER", tmp_path / "no driver")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "hccn.conf"
    path.write_text(CONFIGURATION)
    return path


# ---- the file


@pytest.mark.parametrize(
    ("physical_id", "address"),
    [(0, "198.51.100.20"), (1, "198.51.100.21"), (2, "2001:db8::22"), (3, ""), (4, ""), (10, "198.51.100.30")],
)
def test_addresses_of_the_file(file: Path, physical_id: int, address: str) -> None:
    assert device_address(physical_id, configuration=file) == address


def test_the_tool_is_not_asked_when_the_file_knows(file: Path, make_tool: MakeTool, tmp_path: Path) -> None:
    tool = make_tool("echo ipaddr:198.51.100.99")
    assert device_address(0, configuration=file, tool=tool) == "198.51.100.20"
    assert not (tmp_path / "asked").exists()
    assert device_address(4, configuration=file, tool=tool) == "198.51.100.99"


@pytest.mark.parametrize("line", ["address_0=198.51.100.256", "address_0=2001:db8::20", "IPv6address_0=198.51.100.20"])
def test_a_file_with_something_else(file: Path, line: str) -> None:
    file.write_text(f"{line}\naddress_1=198.51.100.21\n")
    name, _, value = line.partition("=")
    with pytest.raises(BadDeviceAddress, match=rf"hccn.conf has {name}='{value}', should be an IPv. address"):
        device_address(0, configuration=file)
    assert device_address(1, configuration=file) == "198.51.100.21"


def test_a_file_that_cannot_be_read(tmp_path: Path, make_tool: MakeTool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "llm_datadist")
    tool = make_tool("echo ipaddr:198.51.100.20")
    assert device_address(0, configuration=tmp_path, tool=tool) == "198.51.100.20"  # a directory
    assert "addresses of devices cannot be read" in caplog.text


# ---- the tool


def test_what_the_tool_is_asked_and_says(tmp_path: Path, make_tool: MakeTool) -> None:
    nowhere = tmp_path / "nothing"
    tool = make_tool("printf 'ipaddr:198.51.100.20\\nnetmask:255.255.255.0\\n'")
    assert device_address(5, configuration=nowhere, tool=tool) == "198.51.100.20"
    assert asked(tmp_path) == ["-i 5 -ip -g"]
    tool = make_tool('case "$*" in *inet6*) echo "ipaddr: 2001:DB8::20/64";; *) exit 1;; esac')
    assert device_address(6, configuration=nowhere, tool=str(tool)) == "2001:db8::20"
    assert asked(tmp_path)[1:] == ["-i 6 -ip -g", "-i 6 -ip -inet6 -g"]


@pytest.mark.parametrize(
    "answer", ["", "ipaddr:", "ipaddr:none", "ipaddr:0.0.0.0", "ipaddr:198.51.100.256", "\\377\\376"]
)
def test_only_an_address_is_taken(tmp_path: Path, make_tool: MakeTool, answer: str) -> None:
    assert device_address(0, configuration=tmp_path / "nothing", tool=make_tool(f"printf '{answer}\\n'")) == ""


def test_no_shell_reads_the_command(tmp_path: Path, make_tool: MakeTool) -> None:
    tool = make_tool("echo ipaddr:198.51.100.20").rename(tmp_path / "a tool; touch broken")
    assert device_address(0, configuration=tmp_path / "nothing", tool=tool) == "198.51.100.20"


@pytest.mark.parametrize(
    "body",
    ["exec sleep 100", "sleep 100 & wait", "sleep 100 & exit 0", "trap '' TERM HUP; exec sleep 100"],
)
def test_a_tool_that_hangs(tmp_path: Path, make_tool: MakeTool, body: str) -> None:
    """Also one that has left a child behind, which holds the pipe; `leaves_nothing` looks for what is left."""
    noted = tmp_path / "group"
    tool = make_tool(f"echo $$ > {noted}\n{body}")
    for timeout_s in (0.2, 1, 5):  # on a busy machine the script may not even have begun in the time
        began = time.monotonic()
        assert device_address(0, configuration=tmp_path / "nothing", tool=tool, timeout_s=timeout_s) == ""
        assert time.monotonic() - began < timeout_s + PATIENCE_S / 2
        if noted.exists() and noted.stat().st_size:
            break
    group = int(noted.read_text())
    give_up = time.monotonic() + PATIENCE_S
    while is_there(group):
        assert time.monotonic() < give_up
        time.sleep(0.005)


def is_there(group: int) -> bool:
    """Whether a process of a group lives; one that has ended may wait for init to take note of it."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, _, of_group, *_ = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(of_group) == group and state != "Z":
                return True
    return False


def test_a_tool_that_cannot_be_started(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "llm_datadist")
    assert device_address(0, configuration=tmp_path / "nothing", tool=tmp_path / "no tool") == ""
    assert "no tool cannot be started" in caplog.text


def test_where_the_tool_is_looked_for(tmp_path: Path, make_tool: MakeTool, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = tmp_path / "nothing"
    assert device_address(0, configuration=nowhere) == ""
    tool = make_tool("echo ipaddr:198.51.100.20")
    monkeypatch.setattr(module, "TOOL_OF_DRIVER", tool)
    assert device_address(0, configuration=nowhere) == "198.51.100.20"
    (tmp_path / "path").mkdir()
    first = tmp_path / "path" / "hccn_tool"
    first.write_text("#!/bin/sh\necho ipaddr:198.51.100.21\n")
    first.chmod(0o755)
    monkeypatch.setattr(module, "TOOL", "hccn_tool")
    monkeypatch.setenv("PATH", f"{first.parent}{os.pathsep}{os.environ['PATH']}")
    assert device_address(0, configuration=nowhere) == "198.51.100.21"


def test_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="physical_id is -1, should be >= 0"):
        device_address(-1)
    with pytest.raises(TypeError, match="physical_id"):
        device_address("0; reboot")  # type: ignore[arg-type]
