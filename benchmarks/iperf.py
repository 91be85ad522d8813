"""What one stream of TCP carries on the loopback, as iperf3 sees it."""

from __future__ import annotations

import json
import shutil
import subprocess

from .instances import HOST, free_port

SECONDS = 1
_END_S = 20.0


def is_there() -> bool:
    """Tell whether the system has iperf3."""
    return shutil.which("iperf3") is not None


def bytes_per_s() -> float:
    """Let iperf3 send through one stream for a second; gives what has arrived."""
    port = str(free_port())
    server = subprocess.Popen(
        ["iperf3", "--server", "--one-off", "--forceflush", "--bind", HOST, "--port", port],
        stdout=subprocess.PIPE,
        text=True,
    )
    with server:
        assert server.stdout is not None
        try:
            for line in server.stdout:
                if "listening" in line:
                    break
            return _client(port)
        finally:
            server.kill()


def _client(port: str) -> float:
    command = ["iperf3", "--client", HOST, "--port", port, "--time", str(SECONDS), "--parallel", "1", "--json"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS + _END_S)
    document = json.loads(ran.stdout)
    if ran.returncode != 0:
        raise RuntimeError(f"iperf3: {document.get('error', ran.stderr)}")
    return float(document["end"]["sum_received"]["bits_per_second"]) / 8
