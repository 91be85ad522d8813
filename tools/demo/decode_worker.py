"""The decode process: pulls prefilled requests and decodes them together."""

from __future__ import annotations

from multiprocessing.connection import Connection

from llm_datadist import LLMClusterInfo, LLMRole, LLMStatusCode
from llm_datadist.examples.smollm2 import ChatTokenizer, SmolLM2, open_model
from llm_datadist.tools.demo.decode_batch import DecodeBatch
from llm_datadist.tools.demo.kv_layout import DECODE_SLOTS, DECODER_CLUSTER, PROMPT_CLUSTER, pool_bytes
from llm_datadist.tools.demo.messages import AllPrefilled, Listening
from llm_datadist.tools.demo.worker import HOST, open_datadist, receive


def decode_requests(connection: Connection, mode: str, device_id: int) -> None:
    """Decode the requests that the parent announces, until it says that no more will come."""
    file = open_model()
    tokenizer, model = ChatTokenizer(file), SmolLM2.load(file)
    capacity = pool_bytes(model.hyperparameters, DECODE_SLOTS)
    with open_datadist(LLMRole.DECODER, DECODER_CLUSTER, capacity, device_id=device_id) as datadist:
        batch = DecodeBatch(datadist, tokenizer, model, mode)
        listening = receive(connection)
        assert isinstance(listening, Listening)
        prompt = _cluster(listening.port)
        _check_all_done("link", datadist.link_clusters([prompt]))
        _decode(connection, batch)
        batch.close()
        level = batch.level()
        _check_all_done("unlink", datadist.unlink_clusters([prompt]))
        connection.send(level)


def _decode(connection: Connection, batch: DecodeBatch) -> None:
    """Decode until every announced request is answered and no more will come."""
    more_to_come = True
    while more_to_come or batch.waiting or batch.decoding:
        idle = not batch.waiting and not batch.decoding
        while idle or (more_to_come and connection.poll()):
            message = receive(connection)
            if isinstance(message, AllPrefilled):
                more_to_come = False
            else:
                batch.add(message)
            idle = False
        for report in batch.step():
            connection.send(report)


def _cluster(port: int) -> LLMClusterInfo:
    cluster = LLMClusterInfo()
    cluster.remote_cluster_id = PROMPT_CLUSTER
    cluster.append_local_ip_info(HOST, 0)
    cluster.append_remote_ip_info(HOST, port)
    return cluster


def _check_all_done(verb: str, result: tuple[LLMStatusCode, list[LLMStatusCode]]) -> None:
    overall, each = result
    if overall != LLMStatusCode.LLM_SUCCESS:
        raise RuntimeError(f"cannot {verb} the prompt cluster: {overall}, {each}")
