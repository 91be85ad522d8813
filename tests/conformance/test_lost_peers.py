"""A linked process is killed, and the greatest number of links."""

from __future__ import annotations

import importlib
import os
import resource
import time
from collections.abc import Callable
from typing import Any

import pytest

from llm_datadist import CacheKey, LLMDataDist, LLMException, LLMRole, LLMStatusCode
from tests import datadist_member as dd
from tests.conformance.backends import Backend
from tests.conformance.conftest import Start, StartRemote
from tests.conformance.expectations import LINKED, LITTLE_S, NOT_LINKED, OK
from tests.conformance.remote import DECODER, PROMPT, payload_slot, slot, target
from tests.datadist_member import cluster_info
from tests.processes import Member

Members = Callable[[str], Member]
UNLINK_FAILED = LLMStatusCode.LLM_UNLINK_FAILED
MAX_LINKS = 512
SYNC_MS = 1000


def test_C160_a_killed_prompt(start: Start, start_remote: StartRemote, members: Members) -> None:
    prompt, decoder = start_remote(members("prompt"), LLMRole.PROMPT, PROMPT), start(LLMRole.DECODER)
    info = cluster_info(PROMPT, prompt.port or 0)
    assert decoder.link_clusters([info]) == LINKED
    prompt.member.kill()
    started = time.monotonic()
    answer = decoder.unlink_clusters([info], 500)
    assert time.monotonic() - started < 0.5 + LITTLE_S
    assert answer in (LINKED, (UNLINK_FAILED, [LLMStatusCode.LLM_NOTIFY_PROMPT_UNLINK_FAILED]))
    assert decoder.unlink_clusters([info]) == (OK, [NOT_LINKED])
    again = start_remote(members("prompt again"), LLMRole.PROMPT, PROMPT, port=prompt.port)
    assert decoder.link_clusters([info]) == LINKED
    again.offer(CacheKey(1, 7), seed=5)
    mine = target(decoder.kv_cache_manager)
    decoder.kv_cache_manager.pull_cache(CacheKey(PROMPT, 7), mine)
    assert slot(mine, 0, 0) == payload_slot(5, 0, 0)


def test_C161_a_killed_decoder(
    start: Start, free_port: Callable[[], int], start_remote: StartRemote, members: Members
) -> None:
    port = free_port()
    prompt = start(LLMRole.PROMPT, PROMPT, changes={"llm.listenIpInfo": f"127.0.0.1:{port}"})
    decoder = start_remote(members("decoder"), LLMRole.DECODER, DECODER)
    assert decoder.call(dd.link, PROMPT, port) == LINKED
    decoder.member.kill()
    assert prompt.unlink_clusters([cluster_info(DECODER, 1)])[1] in ([OK], [NOT_LINKED])
    again = start_remote(members("decoder again"), LLMRole.DECODER, DECODER)
    assert again.call(dd.link, PROMPT, port) == LINKED
    again.call(dd.check_link, PROMPT)


def test_C164_check_of_a_killed_prompt(start: Start, start_remote: StartRemote, members: Members) -> None:
    prompt = start_remote(members("prompt"), LLMRole.PROMPT, PROMPT)
    decoder = start(LLMRole.DECODER, sync_kv_timeout=SYNC_MS)
    assert decoder.link_clusters([cluster_info(PROMPT, prompt.port or 0)]) == LINKED
    prompt.member.kill()
    started = time.monotonic()
    with pytest.raises(LLMException):
        decoder.check_link_status(PROMPT)
    assert time.monotonic() - started < SYNC_MS / 1000 + LITTLE_S


def allow_many_descriptors(_: dd.State) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def link_many(_: dd.State, count: int, port: int, options: dict[str, str]) -> list[Any]:
    """Fork decoders that link one after the other; give their answers. All links stand until the last one answered."""
    importlib.import_module("llm_datadist.engine.engine")  # once, not in every child
    answers = []
    hold_read, hold_write = os.pipe()
    for number in range(count):
        answer_read, answer_write = os.pipe()
        if os.fork() == 0:
            os.close(hold_write)
            decoder = LLMDataDist(LLMRole.DECODER, 1000 + number)
            decoder.init(options)
            overall, each = decoder.link_clusters([cluster_info(PROMPT, port)], 10000)
            os.write(answer_write, repr([int(overall), *map(int, each)]).encode())
            os.close(answer_write)
            os.read(hold_read, 1)  # ends when the parent closes its end
            os._exit(0)
        os.close(answer_write)
        answers.append(os.read(answer_read, 200).decode())
        os.close(answer_read)
    os.close(hold_write)
    for _child in range(count):
        os.wait()
    os.close(hold_read)
    return answers


@pytest.mark.timeout(300)
def test_C162_the_greatest_number_of_links(
    backend: Backend, start_remote: StartRemote, members: Members, options: Callable[..., dict[str, str]]
) -> None:
    if backend.device == "ascend":
        pytest.skip("the staging buffers of 512 links between simulated devices are 8 GiB of host memory")
    crowd, prompt_process = members("decoders"), members("prompt")
    prompt_process.call(allow_many_descriptors)
    prompt = start_remote(prompt_process, LLMRole.PROMPT, PROMPT)
    given = options(LLMRole.DECODER, pool_bytes=1 << 16)
    answers = crowd.call(link_many, MAX_LINKS + 1, prompt.port, given, timeout=240)
    assert answers[:MAX_LINKS] == [repr([0, 0])] * MAX_LINKS
    assert answers[MAX_LINKS] not in (repr([0, 0]), "")
