"""A server that has no descriptor left: who cannot be linked learns it in time, and it works again afterwards."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable

from llm_datadist import LLMStatusCode
from tests import many_engines
from tests.processes import Member

OK = LLMStatusCode.LLM_SUCCESS
PROMPT, DECODER = 1, 2


def take_descriptors(state: many_engines.State, left: int) -> None:
    """Leave only so many descriptors that this process can still open."""
    used = max(int(name) for name in os.listdir("/proc/self/fd"))
    state["limit"] = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 1 + left, state["limit"][1]))


def give_descriptors_back(state: many_engines.State) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, state["limit"])


def cpu_seconds(state: many_engines.State) -> float:
    return time.process_time()


def test_a_server_without_descriptors(members: Callable[[str], Member]) -> None:
    prompt, decoder = members("prompt"), members("decoder")
    (port,) = prompt.call(many_engines.open_prompts, [PROMPT])
    decoder.call(many_engines.open_decoders, [DECODER])
    for left in range(5):
        prompt.call(take_descriptors, left)
        before = prompt.call(cpu_seconds)
        started = time.monotonic()
        ((overall, _),) = decoder.call(many_engines.link_from_each, [DECODER], PROMPT, port, 500)
        assert time.monotonic() - started < 1.5
        assert prompt.call(cpu_seconds) - before < 0.25, "the server runs in circles"
        prompt.call(give_descriptors_back)
        if overall is OK:
            break
        assert overall is LLMStatusCode.LLM_LINK_FAILED
    assert decoder.call(many_engines.link_from_each, [DECODER], PROMPT, port, 5000) in (
        [(OK, [OK])],
        [(OK, [LLMStatusCode.LLM_ALREADY_LINK])],
    )
    prompt.call(many_engines.close_engines)
    decoder.call(many_engines.close_engines)
