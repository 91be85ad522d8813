"""The prefill process: owns a prompt cluster, prefills one request after the other, and lets the decoder pull."""

from __future__ import annotations

from multiprocessing.connection import Connection

from llm_datadist import LLMRole
from llm_datadist.examples.smollm2 import ChatTokenizer, SmolLM2, open_model
from llm_datadist.tools.demo.kv_layout import PROMPT_CLUSTER, PROMPTS_IN_FLIGHT, pool_bytes
from llm_datadist.tools.demo.messages import AllAnswered, Listening, Prefill, PrefillProgress, Pulled
from llm_datadist.tools.demo.prefiller import Prefiller
from llm_datadist.tools.demo.prompt_tokens import tokenize
from llm_datadist.tools.demo.prompts import Request
from llm_datadist.tools.demo.worker import HOST, free_port, open_datadist, receive


def prefill_requests(
    connection: Connection, requests: list[Request], max_new_tokens: int, mode: str, device_id: int
) -> None:
    """Prefill all requests, and end when the decoder has answered them."""
    file = open_model()
    prompts = tokenize(ChatTokenizer(file), requests, max_new_tokens)
    model = SmolLM2.load(file)
    port = free_port()
    capacity = pool_bytes(model.hyperparameters, PROMPTS_IN_FLIGHT)
    with open_datadist(LLMRole.PROMPT, PROMPT_CLUSTER, capacity, f"{HOST}:{port}", device_id) as datadist:
        connection.send(Listening(port, [len(token_ids) for token_ids in prompts.values()]))
        prefiller = Prefiller(model, datadist, PROMPT_CLUSTER, mode)
        for number, token_ids in prompts.items():
            _prefill(connection, prefiller, Prefill(number, token_ids, max_new_tokens))
        while _read_message(connection, prefiller):
            pass
        prefiller.close()
        connection.send(prefiller.level())


def _prefill(connection: Connection, prefiller: Prefiller, work: Prefill) -> None:
    """Prefill a request as soon as there is room for its KV, and announce it."""
    while connection.poll() or not prefiller.has_room(len(work.token_ids)):
        _read_message(connection, prefiller)
    connection.send(
        prefiller.prefill(work, lambda tokens: connection.send(PrefillProgress(work.request, tokens))),
    )


def _read_message(connection: Connection, prefiller: Prefiller) -> bool:
    """Take the next message; tell whether more will come."""
    message = receive(connection)
    if isinstance(message, Pulled):
        prefiller.pulled(message.request)
    return not isinstance(message, AllAnswered)
