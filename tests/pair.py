"""A linked pair of processes, for tests that pull."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from llm_datadist import LLMRole, LLMStatusCode
from tests import datadist_member as dd
from tests.processes import Member

PROMPT, DECODER = 1, 2  # cluster ids


class Pair(NamedTuple):
    """A prompt process and a decoder process that is linked to it."""

    prompt: Member
    decoder: Member
    port: int
    transport: str = "shared_memory"


def start_prompt(member: Member, port: int, cluster_id: int = PROMPT, **options: Any) -> Member:
    member.call(dd.init_datadist, LLMRole.PROMPT, cluster_id, port=port, **options)
    return member


def start_decoder(member: Member, cluster_id: int = DECODER, **options: Any) -> Member:
    member.call(dd.init_datadist, LLMRole.DECODER, cluster_id, **options)
    return member


def start_pair(members: Callable[[str], Member], port: int, transport: str = "shared_memory") -> Pair:
    """Start the two processes and link them."""
    prompt = start_prompt(members("prompt"), port)
    decoder = start_decoder(members("decoder"), sync_kv_timeout=5000)
    assert decoder.call(dd.link, PROMPT, port) == (LLMStatusCode.LLM_SUCCESS, [LLMStatusCode.LLM_SUCCESS])
    return Pair(prompt, decoder, port, transport)


@pytest.fixture
def pair(members: Callable[[str], Member], free_port: Callable[[], int]) -> Pair:
    """A prompt (cluster 1) and a decoder (cluster 2) that is linked to it, with the default timeout."""
    return start_pair(members, free_port())
