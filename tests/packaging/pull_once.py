"""Pull one cache from another process with the package as it is installed; run by itself, not by pytest.

Exits with 0 if the bytes that arrived are the bytes that were sent.
"""

from __future__ import annotations

import socket
import sys
from multiprocessing.connection import Connection

import numpy as np

import llm_datadist
from llm_datadist import CacheDesc, CacheKey, DataType, LLMClusterInfo, LLMConfig, LLMDataDist, LLMRole, LLMStatusCode
from llm_datadist.cluster.local import LocalGroup
from llm_datadist.views import tensor_view

PROMPT_CLUSTER, DECODER_CLUSTER = 1, 2
DESCRIPTION = CacheDesc(num_tensors=2, shape=(1, 1 << 20), data_type=DataType.DT_FLOAT16)
WAIT_S = 30.0


def start_datadist(role: LLMRole, cluster_id: int, listen: str = "") -> LLMDataDist:
    config = LLMConfig()
    config.device_id = 0
    config.ge_options = {"ge.flowGraphMemMaxSize": str(64 << 20)}
    config.listen_ip_info = listen
    datadist = LLMDataDist(role, cluster_id)
    datadist.init(config.generate_options())
    return datadist


def expected(index: int) -> np.ndarray:
    return (np.arange(1 << 20) % 2039 + index).astype(np.float16)


def prompt(connection: Connection, port: int) -> None:
    """Offer the cache until the decoder says that it has it."""
    datadist = start_datadist(LLMRole.PROMPT, PROMPT_CLUSTER, f"127.0.0.1:{port}")
    cache = datadist.kv_cache_manager.allocate_cache(DESCRIPTION, [CacheKey(PROMPT_CLUSTER, req_id=7)])
    for index in range(DESCRIPTION.num_tensors):
        tensor_view(cache, index)[0] = expected(index)
    connection.send("ready")
    connection.recv()
    datadist.finalize()


def pull(port: int) -> bool:
    datadist = start_datadist(LLMRole.DECODER, DECODER_CLUSTER)
    try:
        link = LLMClusterInfo()
        link.remote_cluster_id = PROMPT_CLUSTER
        link.append_local_ip_info("127.0.0.1", 0)
        link.append_remote_ip_info("127.0.0.1", port)
        overall, _ = datadist.link_clusters([link])
        if overall != LLMStatusCode.LLM_SUCCESS:
            raise RuntimeError(f"linking failed: {overall}")
        manager = datadist.kv_cache_manager
        cache = manager.allocate_cache(DESCRIPTION)
        manager.pull_cache(CacheKey(PROMPT_CLUSTER, req_id=7), cache)
        arrived = [tensor_view(cache, index)[0].tobytes() for index in range(DESCRIPTION.num_tensors)]
        datadist.unlink_clusters([link])
    finally:
        datadist.finalize()
    return arrived == [expected(index).tobytes() for index in range(DESCRIPTION.num_tensors)]


def main() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with LocalGroup() as group:
        worker = group.start("prompt", prompt, port)
        if not worker.connection.poll(WAIT_S) or worker.connection.recv() != "ready":
            raise RuntimeError("the prompt process did not get ready")
        same = pull(port)
        worker.connection.send("done")
        worker.wait(WAIT_S)
    print(f"{llm_datadist.__file__}: the bytes that arrived are {'the same' if same else 'WRONG'}")
    return 0 if same and worker.exitcode == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
