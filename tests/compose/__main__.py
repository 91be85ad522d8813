"""The whole test; its exit status tells: 0 passed or skipped, 1 failed."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from types import FrameType

from tests.compose.cluster import Cluster, running_cluster
from tests.compose.daemon import Daemon, NoDaemon, docker_daemon
from tests.compose.image import build_image, remove_image
from tests.compose.steps import Failed, complain, require, say, step, wait_until
from tests.compose.workload import running_workload

WORKERS = ("prompt-0", "prompt-1", "decoder-0", "decoder-1")
VICTIMS = ("decoder-1", "prompt-1")
PAIRS = {(prompt, decoder) for prompt in ("prompt-0", "prompt-1") for decoder in ("decoder-0", "decoder-1")}

WORK_S = 400.0  # for a workload; on two idle cores it takes an eighth of it
GONE_S = 60.0  # for the registry to notice a death: the lease is 10 s
BACK_S = 120.0


def main() -> int:
    """Run the test and give the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.compose", description=__doc__)
    parser.add_argument("--wheel", type=Path, help="of the package, so that it need not be built once more")
    wheel = parser.parse_args().wheel
    signal.signal(signal.SIGTERM, _end)
    try:
        with docker_daemon() as daemon:
            try:
                build_image(daemon, wheel)
                workers_die_and_come_back(daemon)
                pairs_share_memory(daemon)
            finally:
                remove_image(daemon)
    except NoDaemon as error:
        say(f"compose-test: SKIPPED: {error}")
        return 0
    except Failed as error:
        complain(f"compose-test: FAILED: {error}")
        return 1
    say("compose-test: passed")
    return 0


def workers_die_and_come_back(daemon: Daemon) -> None:
    """Kill a decoder and a prompt in the middle of the work; the others finish it, and those two join again."""
    with running_cluster(daemon, "compose.yaml", WORKERS) as cluster:
        before = cluster.members()
        require(set(before) == set(WORKERS), "all workers are announced at the registry")
        with step("work while a decoder and a prompt are killed"):
            _work_with_deaths(cluster)
        wait_until("the dead have left the registry", lambda: not set(VICTIMS) & set(cluster.members()), GONE_S)
        say("ok: the dead have left the registry")
        with step("start them again"):
            cluster.start(VICTIMS)
            wait_until("both are announced again", lambda: set(cluster.members()) == set(WORKERS), BACK_S)
            cluster.wait_until_healthy(VICTIMS)
        with step("kill the registry and start it again"):
            cluster.kill("registry")
            cluster.start(["registry"])
            cluster.wait_until_healthy(["registry"])
            wait_until("all workers have said who they are", lambda: set(cluster.members()) == set(WORKERS), BACK_S)
        with step("work with all of them"), running_workload(cluster, requests=12, max_new_tokens=8) as work:
            work.finish(WORK_S)
            pairs = {(prompt, decoder) for prompt, decoder, _ in work.pulls}
            require(pairs == PAIRS, "each decoder pulled from each prompt, also those that came back")


def _work_with_deaths(cluster: Cluster) -> None:
    decoder, prompt = VICTIMS
    with running_workload(cluster, requests=20, max_new_tokens=32) as work:
        work.follow_until("answered:", WORK_S)
        work.follow_until(f"pulled by {decoder}:", WORK_S)
        cluster.kill(decoder)
        say(f"killed {decoder}, which was decoding")
        work.follow_until(f"prefilled by {prompt}:", WORK_S)
        cluster.kill(prompt)
        say(f"killed {prompt}, which had more to prefill")
        answered = len(work.answered)
        require(1 <= answered <= 12, f"they died in the middle: {answered} of 20 requests were answered")
        work.finish(WORK_S)
    for victim in VICTIMS:
        again = sum(reason == f"{victim} is gone" for reason in work.again)
        require(again > 0, f"{again} requests of {victim} began again elsewhere")
    transports = {transport for _, _, transport in work.pulls}
    require(transports == {"tcp"}, "KV caches travelled over tcp alone")


def pairs_share_memory(daemon: Daemon) -> None:
    """Containers of one host share memory, also after one was started again; those of different hosts do not."""
    with running_cluster(daemon, "compose.shm.yaml", WORKERS) as cluster:
        with step("work over shared memory and tcp"):
            _check_transports(cluster)
        with step("kill a prompt and start it again"):
            cluster.kill("prompt-0")
            wait_until("it has left the registry", lambda: "prompt-0" not in cluster.members(), GONE_S)
            cluster.start(["prompt-0"])
            wait_until("it is announced again", lambda: "prompt-0" in cluster.members(), BACK_S)
        with step("work again"):
            _check_transports(cluster)


def _check_transports(cluster: Cluster) -> None:
    with running_workload(cluster, requests=8, max_new_tokens=8) as work:
        work.finish(WORK_S)
    for prompt, decoder, transport in work.pulls:
        expected = "shared_memory" if prompt[-1] == decoder[-1] else "tcp"
        if transport != expected:
            raise Failed(f"{decoder} pulled from {prompt} over {transport}, should be {expected}")
    require(
        {transport for _, _, transport in work.pulls} == {"shared_memory", "tcp"},
        "pairs of a host used shared memory, others tcp",
    )


def _end(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)  # through all that has to be taken down


if __name__ == "__main__":
    sys.exit(main())
