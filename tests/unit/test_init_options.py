"""From the options dictionary to what the engine is made from."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llm_datadist import LLMException, LLMRole, LLMStatusCode
from llm_datadist.engine.options import EngineOptions, SizeClass
from llm_datadist.init_options import InitOptions, read_init_options

PROMPT, DECODER, MIX = LLMRole.PROMPT, LLMRole.DECODER, LLMRole.MIX
LOOPBACK = 16777343


def read(role: LLMRole = DECODER, /, **options: Any) -> InitOptions:
    """Read options; the names are written with ``__`` for a dot, and a device is there unless it is given as None."""
    named = {name.replace("__", "."): value for name, value in options.items()}
    named.setdefault("ge.exec.deviceId", "0")
    given = {name: value for name, value in named.items() if value is not None}
    before = dict(given)
    try:
        return read_init_options(role, 5, given)
    finally:
        assert given == before


def refused(
    match: str, role: LLMRole = DECODER, /, status: LLMStatusCode = LLMStatusCode.LLM_PARAM_INVALID, **options: Any
) -> None:
    with pytest.raises(LLMException, match=match) as caught:
        read(role, **options)
    assert caught.value.status_code is status


def test_the_least_options_of_each_role() -> None:
    for role in (DECODER, MIX):
        assert read(role).engine == EngineOptions(role, 5)
    assert read(PROMPT, llm__listenIpInfo="127.0.0.1:26000").engine == EngineOptions(
        PROMPT, 5, listen=(("127.0.0.1", 26000),)
    )


def test_all_options() -> None:
    options = read(
        PROMPT,
        ge__exec__deviceId="3;1",
        llm__listenIpInfo="127.1:26000;10.0.0.1:0",
        llm__SyncKvCacheWaitTime="250",
        llm__EnableSwitchRole="1",
        llm__MemoryUtilization="0.5",
        ge__flowGraphMemMaxSize="4194304",
        llm__BufPoolCfg='{"buf_cfg": [{"total_size": 2097152, "blk_size": 256, "max_buf_size": 8192}]}',
        unknown=5,
    )
    assert options.engine == EngineOptions(
        PROMPT,
        5,
        device_ids=(3, 1),
        listen=(("127.0.0.1", 26000), ("10.0.0.1", 0)),
        sync_kv_timeout_ms=250,
        pool_bytes=2097152,
        enable_switch_role=True,
        buf_pool_classes=(SizeClass(2097152, 256, 8192),),
    )


def test_what_is_written_back() -> None:
    entries = read(PROMPT, ge__exec__deviceId="3;1", llm__listenIpInfo="127.0.0.1:26000;127.0.0.1:1").entries
    assert entries.pop("llm.Role") == "Prompt"
    assert json.loads(entries.pop("llm.ClusterInfo")) == {
        "cluster_id": 5,
        "logic_device_id": ["0:0:0:0", "0:0:1:0"],
        "listen_ip_info": [{"ip": LOOPBACK, "port": 26000}, {"ip": LOOPBACK, "port": 1}],
    }
    assert entries == {}
    assert read(DECODER).entries["llm.Role"] == "Decoder"
    assert read(MIX).entries["llm.Role"] == "Mix"
    assert json.loads(read(DECODER).entries["llm.ClusterInfo"]) == {"cluster_id": 5, "logic_device_id": ["0:0:0:0"]}


# ---- memory


@pytest.mark.parametrize("size", ["1.23", "-1", "", "abc", "9" * 5000])
def test_a_memory_size_that_is_no_number(size: str) -> None:
    refused("ge.flowGraphMemMaxSize is .*should be a decimal number", ge__flowGraphMemMaxSize=size)


def test_memory_that_cannot_be_used() -> None:
    with pytest.raises(TypeError, match="ge.flowGraphMemMaxSize only support str"):
        read(ge__flowGraphMemMaxSize=5)
    refused("only support one mem pool", ge__flowGraphMemMaxSize="1,2")
    refused("ge.flowGraphMemMaxSize", ge__flowGraphMemMaxSize="0")
    refused("ge.flowGraphMemMaxSize", ge__flowGraphMemMaxSize="1048576", llm__MemoryUtilization="0.0")


def test_a_memory_utilization_that_cannot_be_used() -> None:
    with pytest.raises(ValueError, match="abc"):
        read(llm__MemoryUtilization="abc")
    for share in ("1.5", "-0.1", "nan"):
        refused("llm.MemoryUtilization", llm__MemoryUtilization=share)


def test_the_utilization_counts_whether_or_not_it_is_given() -> None:
    assert read(ge__flowGraphMemMaxSize="1000000", llm__MemoryUtilization="1.0").engine.pool_bytes == 1000000
    assert read(ge__flowGraphMemMaxSize="1000000").engine.pool_bytes == 950000
    assert read(llm__MemoryUtilization="0.5").engine.pool_bytes is None


def test_memory_is_looked_at_before_the_rest() -> None:
    with pytest.raises(TypeError):
        read(PROMPT, ge__flowGraphMemMaxSize=5, ge__exec__deviceId=None, llm__EnableCacheManager="1")


# ---- devices and addresses


@pytest.mark.parametrize("ids", ["a", "0;a", "", "0;", "-1", "0,1", str(2**31), "٣"])
def test_device_ids_that_are_no_numbers(ids: str) -> None:
    refused("ge.exec.deviceId", ge__exec__deviceId=ids)


def test_device_ids_must_be_there_as_text() -> None:
    refused("ge.exec.deviceId is required", ge__exec__deviceId=None)
    refused("ge.exec.deviceId is required", PROMPT, ge__exec__deviceId=None)
    with pytest.raises(TypeError, match="ge.exec.deviceId only support str"):
        read(PROMPT, ge__exec__deviceId=0)


def test_a_prompt_needs_an_address_for_each_device() -> None:
    for absent in (None, ""):
        refused("llm.ClusterInfo.*llm.listenIpInfo", PROMPT, llm__listenIpInfo=absent)
    refused("1 addresses for 2 devices", PROMPT, ge__exec__deviceId="0;1", llm__listenIpInfo="127.0.0.1:1")
    refused("2 addresses for 1 devices", PROMPT, llm__listenIpInfo="127.0.0.1:1;127.0.0.1:2")
    with pytest.raises(TypeError, match="llm.listenIpInfo only support str"):
        read(PROMPT, llm__listenIpInfo=26000)


def test_an_address_that_cannot_be_used() -> None:
    for entry in ("127.0.0.1", "127.0.0.1:1:2", "x"):
        refused("ip:port", PROMPT, llm__listenIpInfo=entry)
    with pytest.raises(RuntimeError, match="Can not parse ip str") as caught:
        read(PROMPT, llm__listenIpInfo="abc:1")
    assert not isinstance(caught.value, LLMException)
    for entry in ("127.0.0.1:x", "127.0.0.1:", "127.0.0.1:65536", "127.0.0.1:-1"):
        with pytest.raises(ValueError, match="port") as failed:
            read(PROMPT, llm__listenIpInfo=entry)
        assert not isinstance(failed.value, LLMException)


def test_addresses_are_looked_at_before_the_digits_of_devices() -> None:
    with pytest.raises(RuntimeError, match="Can not parse ip str"):
        read(PROMPT, ge__exec__deviceId="a", llm__listenIpInfo="abc:1")


def test_only_a_prompt_looks_at_addresses() -> None:
    for role in (DECODER, MIX):
        assert read(role, llm__listenIpInfo="nonsense").engine.listen == ()


# ---- a description given by the program


def described(role: LLMRole = PROMPT, /, options: dict[str, str] | None = None, **fields: Any) -> InitOptions:
    text = json.dumps({"cluster_id": 7, "logic_device_id": ["0:0:0:0"], **fields})
    return read_init_options(role, 5, {"llm.ClusterInfo": text, **(options or {})})


def test_a_description_is_used_as_it_is() -> None:
    text = json.dumps({"cluster_id": 7, "listen_ip_info": [{"ip": LOOPBACK, "port": 26000}], "more": [1]})
    given = {"llm.ClusterInfo": text, "llm.listenIpInfo": "nonsense"}
    options = read_init_options(PROMPT, 5, given)
    assert options.engine == EngineOptions(PROMPT, 7, listen=(("127.0.0.1", 26000),))
    assert options.entries["llm.ClusterInfo"] == text
    assert read_init_options(DECODER, 5, given).engine == EngineOptions(DECODER, 7)


def test_a_description_names_devices() -> None:
    listen = [{"ip": LOOPBACK, "port": 1}, {"ip": LOOPBACK, "port": 2}]
    two = {"logic_device_id": ["0:0:4:0", "0:0:6:0"], "listen_ip_info": listen}
    engine = described(**two).engine
    assert (engine.device_ids, engine.listen) == ((4, 6), (("127.0.0.1", 1), ("127.0.0.1", 2)))
    assert described(options={"ge.exec.deviceId": "0;1"}, **two).engine.device_ids == (0, 1)
    ranked = described(options={"ge.exec.rankId": "1"}, **two).engine
    assert (ranked.device_ids, ranked.listen) == ((6,), (("127.0.0.1", 2),))


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "5",
        "{}",
        '{"cluster_id": "1"}',
        '{"cluster_id": true}',
        '{"cluster_id": -1}',
        '{"cluster_id": 18446744073709551616}',
        '{"cluster_id": 1, "logic_device_id": "0:0:0:0"}',
        '{"cluster_id": 1, "logic_device_id": [0]}',
        '{"cluster_id": 1, "logic_device_id": ["0"]}',
        '{"cluster_id": 1, "logic_device_id": ["0:0:a:0"]}',
        '{"cluster_id": 1, "listen_ip_info": {}}',
        '{"cluster_id": 1, "listen_ip_info": [5]}',
        '{"cluster_id": 1, "listen_ip_info": [{"ip": "127.0.0.1", "port": 1}]}',
        '{"cluster_id": 1, "listen_ip_info": [{"ip": 1}]}',
        '{"cluster_id": 1, "listen_ip_info": [{"ip": 4294967296, "port": 1}]}',
        '{"cluster_id": 1, "listen_ip_info": [{"ip": 1, "port": 65536}]}',
        "[" * 100000,
    ],
)
@pytest.mark.parametrize("role", [PROMPT, DECODER])
def test_a_description_that_cannot_be_used(role: LLMRole, text: str) -> None:
    refused("llm.ClusterInfo", role, llm__ClusterInfo=text)


def test_a_description_that_does_not_fit() -> None:
    listen = [{"ip": LOOPBACK, "port": 1}]
    two = ["0:0:0:0", "0:0:1:0"]
    for fields in ({}, {"listen_ip_info": []}, {"logic_device_id": two, "listen_ip_info": listen}):
        with pytest.raises(LLMException, match="a PROMPT needs one for each"):
            described(**fields)
    with pytest.raises(LLMException, match="numbers should be equal"):
        described(options={"ge.exec.deviceId": "0"}, logic_device_id=two, listen_ip_info=listen * 2)
    for rank in ("2", "x", "-1"):
        with pytest.raises(LLMException, match="ge.exec.rankId"):
            described(options={"ge.exec.rankId": rank}, logic_device_id=two, listen_ip_info=listen * 2)
    with pytest.raises(TypeError, match="llm.ClusterInfo only support str"):
        read(llm__ClusterInfo={})


def test_a_text_that_was_made_here_counts_as_absent() -> None:
    options = {"ge.exec.deviceId": "0", "llm.listenIpInfo": "127.0.0.1:26000"}
    options.update(read_init_options(PROMPT, 5, options).entries)
    options.update(read_init_options(DECODER, 6, options).entries)
    assert json.loads(options["llm.ClusterInfo"]) == {"cluster_id": 6, "logic_device_id": ["0:0:0:0"]}
    options["llm.listenIpInfo"] = "127.0.0.1:26001"
    assert read_init_options(PROMPT, 7, options).engine == EngineOptions(PROMPT, 7, listen=(("127.0.0.1", 26001),))


# ---- the rest


@pytest.mark.parametrize("value", ["", "2", "true", "True"])
def test_enable_switch_role_is_0_or_1(value: str) -> None:
    refused("llm.EnableSwitchRole", llm__EnableSwitchRole=value)
    assert read(llm__EnableSwitchRole="0").engine.enable_switch_role is False


@pytest.mark.parametrize("value", ["abc", "0", "-1", "1.5", "", str(2**31)])
def test_a_timeout_that_cannot_be_used(value: str) -> None:
    refused("llm.SyncKvCacheWaitTime", llm__SyncKvCacheWaitTime=value)


@pytest.mark.parametrize("value", ["", "0", "65", "-1", "two", "1.5"])
def test_copy_threads_that_cannot_be(value: str) -> None:
    refused("llm.CopyThreads is .* should be a decimal number in", llm__CopyThreads=value)


@pytest.mark.parametrize("mode", [{}, {"llm__EnableCacheManager": "1"}])
def test_copy_threads(mode: dict[str, str]) -> None:
    assert read(**mode).engine.copy_threads is None
    assert read(**mode, llm__CopyThreads="64").engine.copy_threads == 64


@pytest.mark.parametrize(
    "name", ["llm__EnableSwitchRole", "llm__SyncKvCacheWaitTime", "llm__BufPoolCfg", "llm__CopyThreads"]
)
def test_values_are_text(name: str) -> None:
    with pytest.raises(TypeError, match="only support str"):
        read(**{name: 1})


EXAMPLE = [(2097152, 256, 8192), (10485760, 8192, 8388608), (69206016, 8192, 67108864)]


def pool(*classes: tuple[Any, Any, Any]) -> str:
    names = ("total_size", "blk_size", "max_buf_size")
    return json.dumps({"buf_cfg": [dict(zip(names, sizes)) for sizes in classes]})


def test_the_documented_size_classes_are_accepted() -> None:
    engine = read(llm__BufPoolCfg=pool(*EXAMPLE)).engine
    assert engine.buf_pool_classes == tuple(SizeClass(*sizes) for sizes in EXAMPLE)
    assert engine.pool_bytes == sum(total for total, _, _ in EXAMPLE)


def test_size_classes_must_fit_into_the_memory_limit() -> None:
    wanted = sum(total for total, _, _ in EXAMPLE)
    assert read(llm__BufPoolCfg=pool(*EXAMPLE), ge__flowGraphMemMaxSize=str(wanted)).engine.pool_bytes == wanted
    refused(
        f"llm.BufPoolCfg take {wanted} .* at most {wanted - 1}, which is ge.flowGraphMemMaxSize",
        llm__BufPoolCfg=pool(*EXAMPLE),
        ge__flowGraphMemMaxSize=str(wanted - 1),
    )


MIB = 1 << 20


@pytest.mark.parametrize(
    ("classes", "match"),
    [
        ([], "buf_cfg is empty"),
        ([(2 * MIB, 0, 8192)], "blk_size 0 should be a power of two"),
        ([(2 * MIB, 768, 8192)], "blk_size 768 should be a power of two"),
        ([(8 * MIB, 4 * MIB, 4 * MIB)], "blk_size 4194304 should be a power of two up to 2097152"),
        ([(2 * MIB, 8192, 4096)], "blk_size 8192 should be at most max_buf_size 4096"),
        ([(2**32, 256, 8192)], "total_size 4294967296 should be at most 4294967295"),
        ([(MIB, 256, 8192)], "total_size 1048576 should be a multiple of 2097152"),
        ([(2 * MIB, 256, 2 * MIB)], "max_buf_size 2097152 should be below total_size 2097152"),
        ([(2 * MIB, 256, 8192), (2 * MIB, 256, 8192)], r"max_buf_size should increase.*buf_cfg\[0\].*buf_cfg\[1\]"),
        ([(2 * MIB, 256, 8192), (2 * MIB, 256, -1)], r"buf_cfg\[1\].max_buf_size should be an unsigned integer"),
        ([("2097152", 256, 8192)], r"buf_cfg\[0\].total_size should be an unsigned integer"),
        ([(2 * MIB, True, 8192)], r"buf_cfg\[0\].blk_size should be an unsigned integer"),
        ([(2 * MIB, 256, 8192.0)], r"buf_cfg\[0\].max_buf_size should be an unsigned integer"),
        ([(2 * MIB, 256, None)], r"buf_cfg\[0\].max_buf_size should be an unsigned integer"),
    ],
)
def test_a_violated_rule_of_size_classes_is_named(classes: list[tuple[Any, Any, Any]], match: str) -> None:
    refused(match, llm__BufPoolCfg=pool(*classes))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"buf_cfg": {}}', '{"buf_cfg": [5]}', '{"buf_cfg": [{}]}'])
def test_size_classes_that_cannot_be_read(text: str) -> None:
    refused("llm.BufPoolCfg", llm__BufPoolCfg=text)


def test_a_description_of_the_program_that_is_as_if_made_here() -> None:
    made = read(DECODER, ge__exec__deviceId="0").entries["llm.ClusterInfo"]
    assert read_init_options(DECODER, 5, {"llm.ClusterInfo": made}).engine.cluster_id == 5
