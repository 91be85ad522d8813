"""A demo worker as a process: loads the model, announces itself at the registry, and serves until it is told to end."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from dataclasses import dataclass
from functools import partial
from types import FrameType

from llm_datadist import LLMRole
from llm_datadist.cluster import ClusterMember
from llm_datadist.examples.smollm2 import ChatTokenizer, SmolLM2, open_model
from llm_datadist.tools.demo.decode_batch import DecodeBatch
from llm_datadist.tools.demo.kv_layout import DECODE_SLOTS, PROMPTS_IN_FLIGHT, pool_bytes
from llm_datadist.tools.demo.network.decoder_service import DecoderService
from llm_datadist.tools.demo.network.labels import follow_labels, service_labels
from llm_datadist.tools.demo.network.own_address import address_towards
from llm_datadist.tools.demo.network.prompt_service import PromptService
from llm_datadist.tools.demo.network.service_socket import ServiceSocket
from llm_datadist.tools.demo.prefiller import Prefiller
from llm_datadist.tools.demo.worker import open_datadist

_log = logging.getLogger("llm_datadist.demo")

_ANNOUNCE_S = 60.0  # for a registry that starts at the same time, and for the lease of a predecessor to end

_DRAIN_S = 1.0  # for a prompt that drains; then its requests begin again elsewhere


@dataclass(frozen=True)
class WorkerOptions:
    """What a worker is told at its start."""

    role: LLMRole
    registry: str
    cluster_id: int
    name: str
    mode: str
    listen: str  # host:port for links; a decoder does not listen
    service_host: str
    service_port: int
    advertise: str  # where drivers find it; empty: the address of this host towards the registry


def run_worker_service(options: WorkerOptions) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Raises
    ------
    LLMException
        The address cannot be listened on, or the registry did not answer or refused.
    """
    stopped = _stop_event()
    file = open_model()
    tokenizer, model = ChatTokenizer(file), SmolLM2.load(file)
    is_prompt = options.role is LLMRole.PROMPT
    capacity = pool_bytes(model.hyperparameters, PROMPTS_IN_FLIGHT if is_prompt else DECODE_SLOTS)
    listen = options.listen if is_prompt else ""
    with contextlib.ExitStack() as stack:
        datadist = stack.enter_context(open_datadist(options.role, options.cluster_id, capacity, listen))
        socket = stack.enter_context(ServiceSocket(options.service_host, options.service_port))
        labels = service_labels(options.name, options.mode, _endpoint(options, socket.port))
        member = stack.enter_context(
            ClusterMember(datadist, options.registry, options.cluster_id, listen_ip_info=listen, labels=labels)
        )
        service: PromptService | DecoderService
        if is_prompt:
            prefiller = Prefiller(model, datadist, options.cluster_id, options.mode)
            service = PromptService(socket, prefiller, tokenizer.num_tokens)
        else:
            batch = DecodeBatch(datadist, tokenizer, model, options.mode, partial(member.transfer, timeout_s=_DRAIN_S))
            service = DecoderService(socket, batch, tokenizer.num_tokens)
            member.follow(labels=follow_labels(options.mode))
        stack.callback(service.close)
        member.announce(timeout_s=_ANNOUNCE_S)
        _log.info("%s serves as %s at %s", options.name, options.role.name, labels["service"])
        service.run(stopped)


def _endpoint(options: WorkerOptions, port: int) -> str:
    host = options.advertise or address_towards(options.registry)
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def _stop_event() -> threading.Event:
    """Give an event that SIGTERM and Ctrl-C set; a process with number 1, as in a container, has no other end."""
    stopped = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        stopped.set()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    return stopped
