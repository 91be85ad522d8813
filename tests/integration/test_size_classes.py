"""Size classes of the pool (`llm.BufPoolCfg`) as a program sees them."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from llm_datadist import CacheKey, KvCache, LLMConfig, LLMDataDist, LLMException, LLMRole, LLMStatusCode
from llm_datadist.introspection import pool_statistics
from llm_datadist.views import tensor_view
from tests import datadist_member as dd
from tests.own_instance import Open, desc, expect
from tests.pair import PROMPT, start_decoder, start_prompt
from tests.processes import Member

KIB, MIB = 1 << 10, 1 << 20
FULL = LLMStatusCode.LLM_DEVICE_OUT_OF_MEMORY
EXAMPLE = [(2097152, 256, 8192), (10485760, 8192, 8388608), (69206016, 8192, 67108864)]
TOTAL = sum(total for total, _, _ in EXAMPLE)


def buf_pool(classes: list[tuple[int, int, int]]) -> str:
    names = ("total_size", "blk_size", "max_buf_size")
    return json.dumps({"buf_cfg": [dict(zip(names, sizes)) for sizes in classes]})


@pytest.fixture
def datadist(open_datadist: Open) -> LLMDataDist:
    return open_datadist(LLMRole.DECODER, pool_bytes=TOTAL, ge_options={"llm.BufPoolCfg": buf_pool(EXAMPLE)})


def allocate(datadist: LLMDataDist, tensors: int, nbytes: int) -> KvCache:
    """Allocate `tensors` tensors of `nbytes` bytes each."""
    return datadist.kv_cache_manager.allocate_cache(desc(tensors, [1, nbytes // 2]))


def test_tensors_of_every_class(datadist: LLMDataDist) -> None:
    caches = [allocate(datadist, 2, nbytes) for nbytes in (4 * KIB, 4 * MIB, 32 * MIB)]
    for seed, cache in enumerate(caches):
        for index in range(2):
            tensor_view(cache, index)[...] = seed * 2 + index
    for seed, cache in enumerate(caches):
        assert all(address % 512 == 0 for address in cache.per_device_tensor_addrs[0])
        for index in range(2):
            assert (tensor_view(cache, index) == seed * 2 + index).all()
    expect(FULL, "wanted 1 tensors of 83886080 bytes.*up to 67108864", allocate, datadist, 1, 80 * MIB)
    assert pool_statistics(datadist).capacity == TOTAL


def test_a_full_class_leaves_the_others_alone(datadist: LLMDataDist) -> None:
    held = [allocate(datadist, 1, 8 * KIB) for _ in range(256)]
    expect(FULL, "free 0 bytes.*size class of tensors up to 8192 bytes", allocate, datadist, 1, 2)
    expect(FULL, "wanted 12582912 bytes, free 10485760 bytes", allocate, datadist, 3, 4 * MIB)
    held.append(allocate(datadist, 2, 4 * MIB))
    for cache in held:
        datadist.kv_cache_manager.deallocate_cache(cache)
    assert pool_statistics(datadist).used == 0
    allocate(datadist, 256, 8 * KIB)


def test_the_property_of_the_configuration(open_datadist: Open) -> None:
    config = LLMConfig()
    config.device_id = 0
    config.buf_pool_cfg = buf_pool(EXAMPLE)
    datadist = LLMDataDist(LLMRole.DECODER, 1)
    datadist.init(config.generate_options())
    try:
        assert pool_statistics(datadist).capacity == TOTAL
    finally:
        datadist.finalize()


@pytest.mark.parametrize(
    ("sizes", "rule"),
    [
        ((2 * MIB, 256, 2 * MIB), "below total_size"),
        ((2 * MIB, 768, 8192), "power of two"),
        ((8 * MIB, 4 * MIB, 4 * MIB), "up to 2097152"),
        ((2 * MIB, 8192, 4096), "at most max_buf_size"),
        ((MIB, 256, 8192), "multiple of 2097152"),
        ((1 << 32, 256, 8192), "at most 4294967295"),
    ],
)
def test_a_violated_rule_fails_init(open_datadist: Open, sizes: tuple[int, int, int], rule: str) -> None:
    options = {"llm.BufPoolCfg": buf_pool([sizes])}
    with pytest.raises(LLMException, match=f"llm.BufPoolCfg.*{rule}") as raised:
        open_datadist(LLMRole.DECODER, ge_options=options)
    assert raised.value.status_code is LLMStatusCode.LLM_PARAM_INVALID
    assert LLMDataDist.llm_engine_instance is None


def test_more_than_the_memory_limit_fails_init(open_datadist: Open) -> None:
    options = {"llm.BufPoolCfg": buf_pool(EXAMPLE)}
    with pytest.raises(LLMException, match="llm.BufPoolCfg .*ge.flowGraphMemMaxSize") as raised:
        open_datadist(LLMRole.DECODER, pool_bytes=TOTAL - 1, ge_options=options)
    assert raised.value.status_code is LLMStatusCode.LLM_PARAM_INVALID


def test_a_pull_between_different_classes(members: Callable[[str], Member], free_port: Callable[[], int]) -> None:
    """Steps from tensor to tensor differ: 16 KiB at the prompt, 9 KiB at the decoder."""
    options = {"llm.BufPoolCfg": buf_pool(EXAMPLE)}
    port = free_port()
    prompt = start_prompt(members("prompt"), port, pool_bytes=TOTAL, ge_options=options)
    decoder = start_decoder(members("decoder"))
    decoder.call(dd.link, PROMPT, port)
    source = prompt.call(dd.allocate, 4, (1, 9000), keys=[CacheKey(PROMPT, 1)])
    prompt.call(dd.fill, source, 5)
    target = decoder.call(dd.allocate, 4, (1, 9000))
    decoder.call(dd.pull_cache, CacheKey(PROMPT, 1), target)
    for index in range(4):
        assert decoder.call(dd.read, target, index) == dd.payload(5, index, 9000).tobytes()
