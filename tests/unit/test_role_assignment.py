"""Roles of ranks, from one line of text."""

from __future__ import annotations

import pytest

from llm_datadist import LLMRole
from llm_datadist.cluster.role_assignment import assign_roles, parse_role

P, D, M = LLMRole.PROMPT, LLMRole.DECODER, LLMRole.MIX


@pytest.mark.parametrize(
    ("text", "world_size", "roles"),
    [
        ("prompts=2,decoders=3", 5, (P, P, D, D, D)),
        ("decoders=1, prompts=2", 3, (D, P, P)),
        ("prompts=1", 3, (P, D, D)),
        ("decoders=1", 3, (D, P, P)),
        ("prompts=3", 3, (P, P, P)),
        ("prompts=0", 2, (D, D)),
        ("prompts=1,decoders=1,mixes=1", 3, (P, D, M)),
        ("mixes=2", 2, (M, M)),
        ("Prompts = 1", 2, (P, D)),
        ("PROMPT,decoder,Mix", 3, (P, D, M)),
        ("DECODER", 1, (D,)),
    ],
)
def test_roles_of_ranks(text: str, world_size: int, roles: tuple[LLMRole, ...]) -> None:
    assert assign_roles(text, world_size) == roles


@pytest.mark.parametrize(
    ("text", "world_size", "message"),
    [
        ("prompts=2", 1, "'prompts=2' are for 2 ranks, but there are 1"),
        ("prompts=1,decoders=1", 3, "are for 2 ranks, but there are 3"),
        ("mixes=1", 2, "are for 1 ranks, but there are 2"),
        ("PROMPT,DECODER", 3, "are for 2 ranks, but there are 3"),
        ("prompts=x", 2, "'prompts=x' in it; should be like 'prompts=2'"),
        ("prompts=-1", 2, "should be like"),
        ("workers=1", 2, "'workers=1' in it"),
        ("prompts=1,prompts=1", 2, "'prompts' twice"),
        ("prompts=1,", 2, "with '' in it"),
        ("PROMPT,READER", 2, "'READER', should be one of PROMPT, DECODER, MIX"),
        ("", 1, "role is ''"),
    ],
)
def test_text_that_says_no_roles(text: str, world_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        assign_roles(text, world_size)


def test_name_of_a_role() -> None:
    assert parse_role(" decoder ") is D
    with pytest.raises(ValueError, match="role is 'decode', should be one of PROMPT, DECODER, MIX"):
        parse_role("decode")
