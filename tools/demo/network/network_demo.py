"""A run of the demo over the services of a network, with its check."""

from __future__ import annotations

import time
from collections.abc import Sequence

from llm_datadist.cluster.local import LocalGroup
from llm_datadist.examples.smollm2 import ChatTokenizer, open_model
from llm_datadist.tools.demo.blas_threads import one_blas_thread
from llm_datadist.tools.demo.errors import BadInputError
from llm_datadist.tools.demo.network.driver import Driver
from llm_datadist.tools.demo.network.services import Services
from llm_datadist.tools.demo.outcome import Outcome, RequestRecord
from llm_datadist.tools.demo.prompt_tokens import InputError, tokenize
from llm_datadist.tools.demo.prompts import Request
from llm_datadist.tools.demo.reference_check import check_alone
from llm_datadist.tools.demo.screen import Screen

_STOP_S = 2.0  # for the reference to end after Ctrl-C


def run_network_demo(
    registry: str,
    requests: Sequence[Request],
    max_new_tokens: int,
    mode: str,
    screen: Screen,
    min_prompts: int = 1,
    min_decoders: int = 1,
    wait_s: float = 60.0,
) -> Outcome:
    """Answer the requests with the services at a registry, then check the answers against one process of this host.

    Parameters
    ----------
    registry : str
        ``tcp://host:port``.
    requests : sequence of Request
        What to answer.
    max_new_tokens : int
        Length of an answer.
    mode : str
        ``"cache"`` or ``"blocks"``: the services of this mode are asked.
    screen : Screen
        Shows what happens.
    min_prompts, min_decoders : int
        How many services to wait for at the start.
    wait_s : float
        Seconds to wait for them, and later for at least one of each.

    Raises
    ------
    DemoError
        The services were not there, or a request failed again and again.
    """
    started = time.monotonic()
    outcome = Outcome(mode, max_new_tokens, [RequestRecord(request) for request in requests])
    try:
        prompts = tokenize(ChatTokenizer(open_model()), requests, max_new_tokens)
    except InputError as error:
        raise BadInputError(str(error)) from error
    with Services(registry, mode) as services:
        screen.loading(f"waiting for prompts and decoders at {registry}")
        driver = Driver(services, outcome, screen, prompts, wait_s)
        driver.wait_for(min_prompts, min_decoders)
        driver.run()
        driver.ask_levels()
    with LocalGroup(stop_timeout_s=_STOP_S) as group, one_blas_thread():
        check_alone(group, outcome, screen)
    outcome.seconds = time.monotonic() - started
    return outcome
