"""``llm-datadist launch --registry``: workers find each other through a registry that lives as long as they do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

DEADLINE_S = 60.0

WORKER = """
import time
from llm_datadist import CacheDesc, CacheKey, DataType, LLMDataDist, LLMRole
from llm_datadist.cluster import ClusterMember
from llm_datadist.cluster.rank_environment import read_rank_environment
from llm_datadist.introspection import describe_links, pool_statistics
from llm_datadist.views import tensor_view

KV = CacheDesc(2, (1, 64), DataType.DT_INT8)
DECODERS = (2, 3)  # cluster ids

place = read_rank_environment()
datadist = LLMDataDist(place.role, place.cluster.cluster_id)
datadist.init({**place.cluster.options(), "ge.flowGraphMemMaxSize": str(1 << 20)})
manager = datadist.kv_cache_manager
with ClusterMember(datadist, place.registry, listen_ip_info=";".join(place.cluster.listen_ip_info)) as member:
    if place.role is LLMRole.PROMPT:
        for decoder in DECODERS:
            cache = manager.allocate_cache(KV, [CacheKey(1, decoder)])
            tensor_view(cache, 1)[:] = 10 * decoder
            manager.deallocate_cache(cache)
        member.announce()  # from here on the others find it, with its caches written
        deadline = time.monotonic() + 30.0
        while pool_statistics(datadist).keys or describe_links(datadist):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        print("all pulled")
    else:
        member.announce()
        prompts = member.wait_for(LLMRole.PROMPT, timeout_s=30.0)
        member.link(prompts)
        cache = manager.allocate_cache(KV)
        manager.pull_cache(CacheKey(1, place.cluster.cluster_id), cache)
        print("pulled", tensor_view(cache, 1)[0, 0])
        member.unlink([1])
datadist.finalize()
"""


def test_workers_find_each_other(tmp_path: Path) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    command = [sys.executable, "-m", "llm_datadist.tools.cli", "launch", "--registry", "--prompts", "1"]
    ended = subprocess.run(
        [*command, "--decoders", "2", str(worker)], capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    lines = ended.stdout.splitlines()
    assert {"prompt-0  | all pulled", "decoder-0 | pulled 20", "decoder-1 | pulled 30"} < set(lines)
    assert any(line.startswith("registry  | registry listens at tcp://127.0.0.1:") for line in lines)
