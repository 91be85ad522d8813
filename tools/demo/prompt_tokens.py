"""From the prompts of a run to token ids, with a check that they fit."""

from __future__ import annotations

from collections.abc import Sequence

from llm_datadist.examples.smollm2 import ChatTokenizer
from llm_datadist.tools.demo.kv_layout import MAX_TOKENS
from llm_datadist.tools.demo.prompts import Request


class InputError(Exception):
    """The user's input cannot be processed; shown without a traceback."""


def tokenize(tokenizer: ChatTokenizer, requests: Sequence[Request], max_new_tokens: int) -> dict[int, list[int]]:
    """Return the token ids of each request, by its number.

    Raises
    ------
    InputError
        A prompt is too long for a cache that must hold its answer too.
    """
    prompts = {request.number: tokenizer.encode_chat(request.prompt) for request in requests}
    room = MAX_TOKENS - max_new_tokens
    for number, token_ids in prompts.items():
        if len(token_ids) > room:
            raise InputError(
                f"the prompt of request {number} has {len(token_ids)} tokens; at most {room} fit beside an answer of "
                f"{max_new_tokens}"
            )
    return prompts
