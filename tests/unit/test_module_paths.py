"""Module paths that existing programs import: every name there is the one object that lives in `llm_datadist`."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import llm_datadist

VALIDATORS = {
    *("check_isinstance", "check_dict", "check_positive_or_set_default"),
    *("check_uint8", "check_uint16", "check_uint32", "check_uint64", "check_int32", "check_int64"),
    *("check_list_int32", "check_list_int64", "check_list_uint64"),
}
LOG = {"info", "warn", "error", "get_logger"}
STATUS = {
    *("LLMStatusCode", "LLMException", "Status"),
    *("code_2_status", "handle_llm_status", "raise_if_false", "raise_if_true"),
}
CONFIGS = {"LLMRole", "LLMClusterInfo", "LlmConfig", "LLMConfig", "trans_str_ip"}
DATA_TYPE = {
    *("DataType", "dtype_to_np_dtype", "np_dtype_to_dtype", "valid_np_dtypes"),
    *("python_dtype_2_dwrapper_dtype", "get_python_dtype_from_wrapper_dtype"),
}
V1_TYPES = {
    *("CacheDesc", "CacheKey", "CacheKeyByIdAndIndex", "BlocksCacheKey", "KvCache", "Placement", "LayerSynchronizer"),
    *("TransferConfig", "TransferWithCacheKeyConfig", "CacheTask", "check_layer_range"),
}
V2_TYPES = V1_TYPES | {"Cache", "RegisterMemStatus", "Memtype", "MemInfo", "PushType", "int_to_mem_status_dict"}
UTILS = {"layer_range_to_tensor_indices", "parse_listen_ip_info", "is_invalid_id", "is_valid_id"}
DATADIST = {"LLMDataDist", "_shutdown_handler"}

# Module path and its names.
PATHS = [
    ("llm_datadist.status", STATUS),
    ("llm_datadist.configs", CONFIGS),
    ("llm_datadist.data_type", DATA_TYPE),
    ("llm_datadist.tensor", {"Tensor", "TensorDesc"}),
    ("llm_datadist.utils", VALIDATORS | LOG),
    ("llm_datadist.utils.utils", VALIDATORS),
    ("llm_datadist.utils.log", LOG),
    ("llm_datadist.v2.llm_types", V2_TYPES),
    ("llm_datadist.v2.llm_datadist", DATADIST),
    ("llm_datadist.v2.llm_utils", UTILS),
    ("llm_datadist.v2.kv_cache_manager", {"KvCacheManager"}),
    ("llm_datadist.v2.cache_manager", {"CacheManager"}),
    ("llm_datadist_v1.configs", CONFIGS),
    ("llm_datadist_v1.data_type", DATA_TYPE),
    ("llm_datadist_v1.kv_cache_manager", {"KvCacheManager"}),
    ("llm_datadist_v1.llm_datadist", DATADIST),
    ("llm_datadist_v1.llm_types", V1_TYPES),
    ("llm_datadist_v1.llm_utils", UTILS),
    ("llm_datadist_v1.status", STATUS),
    ("llm_datadist_v1.tensor", {"Tensor", "TensorDesc"}),
    ("llm_datadist_v1.utils", VALIDATORS),
]
# Where names live; those of the logger are made in `utils.log`.
HOMES = [
    importlib.import_module(f"llm_datadist.{name}")
    for name in (
        *("status", "configs", "cluster_info", "ip_address", "roles", "data_type", "tensor", "arguments", "cache_desc"),
        *("cache_keys", "cache_task", "kv_cache", "kv_cache_manager", "layer_synchronizer", "memory_info", "datadist"),
        *("cache", "cache_manager"),
        *("transfer_config", "layer_range", "cluster_info_option", "log", "utils.log"),
    )
]


@pytest.mark.parametrize(("path", "names"), PATHS, ids=[path for path, _ in PATHS])
def test_a_path_has_its_names_and_they_are_the_same_objects(path: str, names: set[str]) -> None:
    module = importlib.import_module(path)
    for name in names:
        found = getattr(module, name)
        assert any(found is getattr(home, name, None) for home in HOMES), name
        if hasattr(llm_datadist, name):
            assert found is getattr(llm_datadist, name)


def test_classes_name_one_home() -> None:
    """A class says where it lives, and that is no alias module."""
    aliases = ("llm_datadist.utils", "llm_datadist.v2", "llm_datadist_v1")
    for path, names in PATHS:
        for name in names:
            found = getattr(importlib.import_module(path), name)
            if isinstance(found, type):
                assert not found.__module__.startswith(aliases)
                assert getattr(importlib.import_module(found.__module__), found.__name__) is found


def test_the_names_of_the_first_generation() -> None:
    import llm_datadist_v1

    names = set(llm_datadist.__all__) - {"Cache", "Memtype", "MemInfo", "RegisterMemStatus"}
    assert set(llm_datadist_v1.__all__) == names
    for name in names:
        assert getattr(llm_datadist_v1, name) is getattr(llm_datadist, name)


def test_the_list_of_the_second_generation() -> None:
    assert set(llm_datadist.__all__) - set(llm_datadist.v2_list) == {"TensorDesc", "Tensor", "KvCacheManager"}
    assert set(llm_datadist.v2_list) < set(llm_datadist.__all__)
    assert "CacheManager" not in llm_datadist.__all__


def test_module_paths_alone_are_light() -> None:
    paths = [path for path, _ in PATHS if not path.endswith(("data_type", "_v1.data_type"))]
    code = f"""
import importlib, sys
for path in {paths!r}:
    importlib.import_module(path)
assert not [name for name in ("numpy", "zmq", "msgpack", "torch", "llm_datadist._core") if name in sys.modules]
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)


def test_ids() -> None:
    from llm_datadist.v2.llm_utils import is_invalid_id, is_valid_id

    for number, valid in ((0, True), (2**64 - 2, True), (2**64 - 1, False)):
        assert is_valid_id(number) is valid
        assert is_invalid_id(number) is not valid


def test_listen_ip_info() -> None:
    from llm_datadist.v2.llm_utils import parse_listen_ip_info

    assert parse_listen_ip_info("127.0.0.1:26000") == (16777343, 26000)
    with pytest.raises(llm_datadist.LLMException, match="ip:port"):
        parse_listen_ip_info("127.0.0.1")


def test_layer_range() -> None:
    from llm_datadist.v2.llm_types import check_layer_range

    assert check_layer_range("layers", range(1, 3)) == range(1, 3)
    with pytest.raises(TypeError, match="layers only support range"):
        check_layer_range("layers", [1, 2])
    for layers in (range(0), range(-1, 1), range(0, 4, 2)):
        with pytest.raises(llm_datadist.LLMException) as raised:
            check_layer_range("layers", layers)
        assert raised.value.status_code is llm_datadist.LLMStatusCode.LLM_PARAM_INVALID


def test_log_functions(capsys: pytest.CaptureFixture[str]) -> None:
    from llm_datadist.utils import error, get_logger, info, warn

    assert get_logger().name == "llm_datadist"
    for write, level in ((error, "ERROR"), (warn, "WARNING"), (info, "INFO")):
        records = []
        get_logger().addFilter(keep := lambda record, kept=records: kept.append(record) or False)
        previous = get_logger().level
        try:
            get_logger().setLevel("DEBUG")
            write("cluster %d", 5)
        finally:
            get_logger().setLevel(previous)
            get_logger().removeFilter(keep)
        assert [(record.levelname, record.getMessage()) for record in records] == [(level, "cluster 5")]
