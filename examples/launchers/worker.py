"""A worker that runs unchanged under llm-datadist launch, torchrun, mpirun, srun and Kubernetes.

Its launcher says which rank it is; the cluster file in LLM_DATADIST_CLUSTER says what each rank does and where the
prompts listen. Every prompt offers a cache to each decoder. Every decoder links to all prompts, pulls its caches, and
compares all bytes. A process that fails ends with a status other than 0, and its launcher ends the others.
"""

from __future__ import annotations

import time

import numpy as np

from llm_datadist import (
    CacheDesc,
    CacheKey,
    DataType,
    KvCache,
    KvCacheManager,
    LLMDataDist,
    LLMException,
    LLMRole,
    LLMStatusCode,
)
from llm_datadist.cluster.cluster_file import Cluster
from llm_datadist.cluster.rank_environment import RankEnvironment, read_rank_environment
from llm_datadist.introspection import describe_links, pool_statistics
from llm_datadist.views import tensor_view

KV = CacheDesc(4, (1, 256, 64), DataType.DT_FLOAT16)  # K and V of two layers
READY = CacheDesc(1, (1, 1), DataType.DT_INT8)
KV_MODEL, READY_MODEL = 0, 1  # model ids, to tell their keys apart
OPTIONS = {"ge.flowGraphMemMaxSize": str(64 << 20), "llm.SyncKvCacheWaitTime": "10000"}
DEADLINE_S = 60.0  # for the others to start, and to end
LOOK_AGAIN_S = 0.02


def content(prompt: int, decoder: int, tensor: int) -> np.ndarray:
    """Make what a prompt writes for a decoder; different for every pair of them."""
    return np.random.default_rng((prompt, decoder, tensor)).standard_normal(KV.shape).astype(np.float16)


def open_datadist(cluster: Cluster) -> LLMDataDist:
    datadist = LLMDataDist(cluster.role, cluster.cluster_id)
    datadist.init({**OPTIONS, **cluster.options()})
    return datadist


def offer(place: RankEnvironment) -> str:
    prompt = open_datadist(place.cluster)
    own_id = place.cluster.cluster_id
    decoders = place.with_role(LLMRole.DECODER)
    manager = prompt.kv_cache_manager
    for decoder in decoders:
        cache = manager.allocate_cache(KV, [CacheKey(own_id, decoder.cluster_id, KV_MODEL)])
        for tensor in range(KV.num_tensors):
            tensor_view(cache, tensor)[:] = content(own_id, decoder.cluster_id, tensor)
        manager.deallocate_cache(cache)  # its key holds it until it is pulled
        # A key can be pulled as soon as it is there, whatever is in the cache: a second one says that all is written.
        # Programs with a router between prefill and decode need none: it tells the decoder.
        manager.deallocate_cache(manager.allocate_cache(READY, [CacheKey(own_id, decoder.cluster_id, READY_MODEL)]))
    deadline = time.monotonic() + DEADLINE_S
    while (left := pool_statistics(prompt).keys) or describe_links(prompt):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{left} caches were not pulled within {DEADLINE_S} s")
        time.sleep(LOOK_AGAIN_S)
    prompt.finalize()
    return f"{len(decoders)} caches were pulled"


def pull(place: RankEnvironment) -> str:
    decoder = open_datadist(place.cluster)
    own_id = place.cluster.cluster_id
    prompts = place.with_role(LLMRole.PROMPT)
    for prompt in prompts:
        link(decoder, prompt)
    manager = decoder.kv_cache_manager
    cache, ready = manager.allocate_cache(KV), manager.allocate_cache(READY)
    for prompt in prompts:
        pull_when_there(manager, CacheKey(prompt.cluster_id, own_id, READY_MODEL), ready)
        manager.pull_cache(CacheKey(prompt.cluster_id, own_id, KV_MODEL), cache)
        for tensor in range(KV.num_tensors):
            np.testing.assert_array_equal(tensor_view(cache, tensor), content(prompt.cluster_id, own_id, tensor))
    decoder.unlink_clusters([prompt.link_info() for prompt in prompts])
    decoder.finalize()
    return f"pulled from {len(prompts)} prompts, all bytes are right"


def link(decoder: LLMDataDist, prompt: Cluster) -> None:
    """Link as soon as the prompt listens: nobody says in which order a launcher's processes come up."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        overall, _ = decoder.link_clusters([prompt.link_info()], timeout=5000)
        if overall is LLMStatusCode.LLM_SUCCESS:
            return
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"no link to prompt {prompt.cluster_id} within {DEADLINE_S} s, the last try gave {overall}"
            )
        time.sleep(LOOK_AGAIN_S)


def pull_when_there(manager: KvCacheManager, key: CacheKey, cache: KvCache) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while True:
        try:
            return manager.pull_cache(key, cache)
        except LLMException as error:
            if error.status_code is not LLMStatusCode.LLM_KV_CACHE_NOT_EXIST or time.monotonic() > deadline:
                raise
        time.sleep(LOOK_AGAIN_S)


def main() -> None:
    place = read_rank_environment()
    work = {LLMRole.PROMPT: offer, LLMRole.DECODER: pull}[place.cluster.role]
    done = work(place)
    print(
        f"rank {place.rank} of {place.world_size}, {place.cluster.role.name}, by {place.launcher}: {done}", flush=True
    )


if __name__ == "__main__":
    main()
