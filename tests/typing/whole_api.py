"""A program that uses the whole public API, for the type checker: ``mypy --strict`` has to accept it. It is not run."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from llm_datadist import (
    BlocksCacheKey,
    Cache,
    CacheDesc,
    CacheKey,
    CacheKeyByIdAndIndex,
    CacheTask,
    DataType,
    KvCache,
    KvCacheManager,
    LayerSynchronizer,
    LLMClusterInfo,
    LLMConfig,
    LlmConfig,
    LLMDataDist,
    LLMException,
    LLMRole,
    LLMStatusCode,
    MemInfo,
    Memtype,
    Placement,
    RegisterMemStatus,
    Status,
    Tensor,
    TensorDesc,
    TransferConfig,
    TransferWithCacheKeyConfig,
)
from llm_datadist.cluster.local import LocalGroup, LocalWorker
from llm_datadist.configs import trans_str_ip
from llm_datadist.data_type import dtype_to_np_dtype, get_python_dtype_from_wrapper_dtype, np_dtype_to_dtype
from llm_datadist.introspection import describe_links, pool_statistics
from llm_datadist.pool_tensors import PoolTensor, allocate_tensor
from llm_datadist.status import code_2_status, handle_llm_status, raise_if_false, raise_if_true
from llm_datadist.v2.cache_manager import CacheManager
from llm_datadist.views import dlpack_view, tensor_view

Answer = tuple[LLMStatusCode, list[LLMStatusCode]]


def configure(role: LLMRole) -> dict[str, str]:
    config = LLMConfig()
    same_class: type[LLMConfig] = LlmConfig
    assert isinstance(config, same_class)
    config.device_id = 0
    config.device_id = [0, 1]
    config.device_id = (0, 1)
    config.sync_kv_timeout = 1000
    config.sync_kv_timeout = "1000"
    config.enable_switch_role = True
    config.ge_options = {"ge.flowGraphMemMaxSize": "1073741824"}
    config.mem_utilization = 0.95
    config.buf_pool_cfg = '{"buf_cfg": []}'
    config.cluster_info = "{}"
    config.deploy_res_path = ""
    config.output_max_size = 1
    if role is LLMRole.PROMPT:
        config.listen_ip_info = "127.0.0.1:26000"
    assert config.options is config.gen_options()
    return config.generate_options()


def describe() -> list[CacheDesc]:
    plain = CacheDesc(4, (8, 1024), DataType.DT_FLOAT16)
    host = CacheDesc(
        num_tensors=4,
        shape=[8, 1024],
        data_type=DataType.DT_BF16,
        placement=Placement.HOST,
        batch_dim_index=0,
        seq_len_dim_index=1,
        kv_tensor_format="BSH",
    )
    host.update_dim(1, 2048)
    numbers: list[int] = [plain.num_tensors, plain.size, plain.batch_size, plain.batch_dim, plain.seq_len_dim_index]
    others: tuple[DataType, Placement, str | None] = (plain.data_type, plain.placement, plain.kv_tensor_format)
    assert len(numbers) + len(others) == len(plain.shape) + 6
    return [plain, host]


def name() -> tuple[CacheKey, CacheKeyByIdAndIndex, BlocksCacheKey]:
    request = CacheKey(1, 2, 3, 4)
    request = CacheKey(prompt_cluster_id=1, req_id=2, model_id=3)
    slot = CacheKeyByIdAndIndex(1, 2, batch_index=3)
    blocks = BlocksCacheKey(prompt_cluster_id=1, model_id=0)
    assert request.prompt_cluster_id + request.cluster_id + request.req_id + request.model_id + request.prefix_id
    assert slot.cluster_id + slot.cache_id + slot.batch_index
    assert blocks.prompt_cluster_id + blocks.cluster_id + blocks.model_id
    return request, slot, blocks


def link(decoder: LLMDataDist) -> LLMStatusCode:
    info = LLMClusterInfo()
    info.remote_cluster_id = 1
    info.append_local_ip_info("127.0.0.1", 0)
    info.append_remote_ip_info(trans_str_ip("127.0.0.1"), 26000)
    addresses: list[tuple[int | str, int]] = [*info.local_ip_info_list, *info.remote_ip_info_list]
    linked: Answer = decoder.link_clusters([info], timeout=len(addresses) * 1000)
    decoder.check_link_status(remote_cluster_id=1)
    unlinked: Answer = decoder.unlink_clusters((info,), timeout=3000, force=False)
    return linked[0] if linked[0] is not LLMStatusCode.LLM_SUCCESS else unlinked[1][0]


def offer(manager: KvCacheManager, desc: CacheDesc) -> list[KvCache]:
    request, _, blocks_key = name()
    plain = manager.allocate_cache(desc, [request])
    plain = manager.allocate_cache(cache_desc=desc, cache_keys=(request,))
    blocks = manager.allocate_blocks_cache(desc, blocks_key)
    manager.remove_cache_key(request)
    addresses: list[list[int]] = plain.per_device_tensor_addrs
    assert plain.cache_id + blocks.cache_id + len(addresses)
    assert plain.cache_desc is desc
    return [plain, blocks]


def pull(manager: KvCacheManager, cache: KvCache) -> None:
    request, slot, blocks = name()
    manager.pull_cache(request, cache)
    manager.pull_cache(
        slot,
        cache,
        batch_index=1,
        size=64,
        src_layer_range=range(1),
        dst_layer_range=range(1, 2),
        src_cache_offset=0,
        dst_cache_offset=0,
        tensor_num_per_layer=2,
    )
    manager.pull_blocks(blocks, cache, [0, 1], [2, 3], src_layer_range=range(1))
    token: bytes = manager.publish_blocks(cache, [0, 1], lease_s=30)
    manager.pull_blocks(blocks, cache, [0, 1], [2, 3], token=token)
    manager.retire_blocks(token)
    expired: list[int] = manager.retire_expired(cache)
    assert not expired


def copy(manager: KvCacheManager, cache: KvCache, other: KvCache, addresses: list[int]) -> npt.NDArray[np.float16]:
    manager.copy_cache(other, cache, dst_batch_index=1, src_batch_index=0, offset=0, size=-1, req_id=7)
    manager.copy_blocks(cache, {0: [1, 2]})
    host = KvCache.create_cpu_cache(describe()[1], addresses)
    host = KvCache.create_cpu_cache(describe()[1], [addresses, addresses])
    manager.swap_blocks(cache, host, {0: 1})
    manager.swap_blocks(host, cache, {1: 0})
    tensors: list[Tensor] = manager.get_cache_tensors(cache, tensor_index=0)
    values: npt.NDArray[np.float16] = tensors[0].numpy(copy=True)
    view: npt.NDArray[np.float16] = tensor_view(cache, 0, 0)
    assert dlpack_view(cache, 1).__dlpack_device__()
    manager.deallocate_cache(cache)
    return values + view


class Computed(LayerSynchronizer):
    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        return timeout_in_millis is None and layer_index >= 0


def transfer(manager: KvCacheManager, cache: KvCache, addresses: list[int]) -> list[LLMStatusCode | None]:
    config = TransferConfig(2, addresses, src_layer_range=range(2), src_batch_index=0)
    config.dst_addrs = tuple(addresses)
    by_key = TransferWithCacheKeyConfig(BlocksCacheKey(2), range(2), range(2), 0)
    assert by_key.src_layer_range == by_key.dst_layer_range
    task: CacheTask = manager.transfer_cache_async(cache, Computed(), [config])
    task = manager.transfer_cache_async(
        cache, Computed(), (config,), src_block_indices=[0], dst_block_indices=(1,), dst_block_memory_size=None
    )
    code: LLMStatusCode = task.synchronize(1000)
    return [code, *task.get_results(timeout_in_millis=1000)]


def configure_cache_manager() -> dict[str, str]:
    config = LLMConfig()
    config.enable_cache_manager = True
    config.enable_remote_cache_accessible = True
    config.mem_pool_cfg = '{"memory_size": 1048576, "page_shift": 16}'
    config.host_mem_pool_cfg = '{"memory_size": 1048576}'
    config.rdma_traffic_class = 132
    config.rdma_service_level = 4
    config.local_comm_res = ""
    config.link_total_time = 60
    config.link_retry_count = 2
    config.transfer_backend = "hixl"
    config.global_resource_config = "{}"
    return config.generate_options()


def hold(manager: CacheManager, datadist: LLMDataDist) -> list[Cache]:
    request, _, blocks_key = name()
    desc, host = describe()
    tensor: PoolTensor = allocate_tensor(datadist, (8, 1024), DataType.DT_FLOAT16, placement=Placement.HOST)
    array: npt.NDArray[np.float16] = tensor.numpy()
    assert array.size
    assert tensor.__dlpack_device__()
    assert tensor.shape
    assert tensor.data_type
    assert tensor.nbytes
    addresses = [tensor.address] * 4
    plain = manager.allocate_cache(desc, [request])
    blocks = manager.allocate_blocks_cache(cache_desc=desc, blocks_cache_key=blocks_key)
    registered = manager.register_cache(desc, addresses, (request,), remote_accessible=True)
    registered_blocks = manager.register_blocks_cache(desc, addrs=addresses, blocks_cache_key=blocks_key)
    manager.remap_registered_memory([MemInfo(Memtype.MEM_TYPE_DEVICE, addresses[0], desc.size)])
    manager.remap_registered_memory(MemInfo(Memtype.MEM_TYPE_DEVICE, addresses[0], desc.size))
    assert plain.cache_desc is desc
    assert not plain.is_blocks_cache
    assert plain.tensor_addrs == addresses
    return [plain, blocks, registered, registered_blocks, Cache.create_cpu_cache(host, addresses)]


def move(manager: CacheManager, caches: list[Cache]) -> list[LLMStatusCode | None]:
    request, slot, blocks_key = name()
    plain, blocks, registered, _, host = caches
    manager.pull_cache(slot, plain, batch_index=1, size=64, src_layer_range=range(1), tensor_num_per_layer=2)
    manager.pull_blocks(blocks_key, blocks, [0], (1,), dst_layer_range=range(1))
    manager.pull_blocks(src_cache_key=request, dst_cache=blocks, dst_blocks=[1, 2])
    manager.push_cache(slot, plain, 0, range(1), range(1), size=-1, tensor_num_per_layer=2)
    manager.push_blocks(blocks_key, blocks, [0], [1], src_layer_range=range(1), dst_layer_range=range(1))
    manager.copy_cache(plain, registered, dst_batch_index=1, src_batch_index=0, offset=0, size=-1, req_id=7)
    manager.copy_blocks(blocks, {0: [1, 2]})
    manager.swap_blocks(src_cache=blocks, dst_cache=host, src_to_dst={0: 1})
    token: bytes = manager.publish_blocks(blocks, (0, 1))
    manager.pull_blocks(blocks_key, blocks, [0], [1], token=token)
    manager.retire_blocks(token)
    by_key = TransferWithCacheKeyConfig(blocks_key, range(2), range(2))
    task = manager.transfer_cache_async(blocks, Computed(), [by_key], [0], [1])
    task = manager.transfer_cache_async(plain, Computed(), (TransferConfig(2, [512] * 4),), None, [1], 2048)
    view: npt.NDArray[np.float16] = tensor_view(blocks, 1)
    assert view.size
    assert dlpack_view(plain)
    return [task.synchronize(0), *task.get_results()]


def let_go(manager: CacheManager, caches: list[Cache]) -> None:
    plain, blocks, registered, registered_blocks, _ = caches
    manager.remove_cache_key(name()[0])
    manager.deallocate_cache(plain)
    manager.deallocate_blocks_cache(blocks)
    manager.unregister_cache(registered.cache_id)
    manager.unregister_cache(cache_id=registered_blocks.cache_id)


def run_cache_manager() -> None:
    datadist = LLMDataDist(LLMRole.MIX, cluster_id=2)
    datadist.init(configure_cache_manager())
    manager: CacheManager = datadist.cache_manager
    comm_id: int = datadist.link(comm_name="pair", cluster_rank_info={1: 0, 2: 1}, rank_table="{}")
    status: RegisterMemStatus = datadist.query_register_mem_status(comm_id)
    if status is RegisterMemStatus.OK:
        caches = hold(manager, datadist)
        move(manager, caches)
        let_go(manager, caches)
    datadist.unlink(comm_id)
    datadist.finalize()


def judge(error: LLMException) -> LLMStatusCode:
    code: LLMStatusCode = error.status_code
    if Status(code).is_ok() or Status(code).status_code == 0:
        raise_if_false(code, "a {0}", 1, status_code=LLMStatusCode.LLM_FAILED)
        raise_if_true(not code, "a {0}", 1)
    handle_llm_status(int(code), "pull_cache", "")
    return code_2_status(code.value)


def look(datadist: LLMDataDist) -> int:
    links = describe_links(datadist)
    level = pool_statistics(datadist)
    array = np.zeros((2, 3), np.float32)
    tensor = Tensor(array, TensorDesc(np_dtype_to_dtype[array.dtype], (2, 3)))
    assert dtype_to_np_dtype[get_python_dtype_from_wrapper_dtype(0)] is np.float32
    info = MemInfo(Memtype.MEM_TYPE_HOST, 4096, 64)
    assert RegisterMemStatus.OK is RegisterMemStatus(0)
    return level.free + len(links) + tensor.numpy().size + info.size


def run(worker: LocalWorker) -> bool:
    return worker.wait(1.0) and worker.exitcode == 0


def main() -> None:
    datadist = LLMDataDist(LLMRole.PROMPT, cluster_id=1)
    datadist.init(configure(LLMRole.PROMPT))
    manager: KvCacheManager = datadist.kv_cache_manager
    try:
        caches = offer(manager, describe()[0])
        transfer(manager, caches[0], [512] * 4)
        datadist.switch_role(LLMRole.DECODER)
        link(datadist)
        pull(manager, caches[0])
        copy(manager, caches[0], caches[1], [512] * 4)
        datadist.switch_role(LLMRole.PROMPT, {"llm.listenIpInfo": "127.0.0.1:26000"})
    except LLMException as error:
        judge(error)
    with LocalGroup() as group:
        run(group.start("worker", print))
    assert look(datadist)
    assert manager.is_initialized()
    assert datadist.cluster_id
    datadist.finalize()
