"""The check: the same model answers the same prompts in one process, alone, with its KV cache in plain arrays."""

from __future__ import annotations

import zlib
from multiprocessing.connection import Connection

from llm_datadist.examples.smollm2 import ChatTokenizer, SmolLM2, generate, open_model
from llm_datadist.tools.demo.messages import Referenced
from llm_datadist.tools.demo.prompts import Request


def answer_alone(connection: Connection, requests: list[Request], max_new_tokens: int) -> None:
    """Send the token ids of the answer to each request."""
    file = open_model()
    tokenizer, model = ChatTokenizer(file), SmolLM2.load(file)
    for request in requests:
        prompt = tokenizer.encode_chat(request.prompt)
        token_ids, checksum = [], 0
        for token, logits in generate(model, prompt, max_new_tokens, tokenizer.end_of_turn):
            token_ids.append(token)
            checksum = zlib.crc32(logits.data, checksum)
        connection.send(Referenced(request.number, token_ids, checksum))
