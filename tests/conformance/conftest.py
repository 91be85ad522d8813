"""Instances in the test's process and in others. The other processes are started once and serve many tests."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

from llm_datadist import KvCacheManager, LLMDataDist, LLMRole
from llm_datadist._acl import Device
from llm_datadist.v2.cache_manager import CacheManager
from tests import datadist_member as dd
from tests import simulated_devices
from tests.conformance import registering
from tests.conformance.backends import BACKENDS, MEMORY_BACKENDS, Backend
from tests.conformance.expectations import LINKED
from tests.conformance.registering import Registered, RegisteringRemote
from tests.conformance.remote import DECODER, PROMPT, Remote, link_to
from tests.datadist_member import make_options
from tests.processes import Member
from tests.simulated_devices import DeviceMembers
from tests.warm_group import process_group

Start = Callable[..., LLMDataDist]
StartRemote = Callable[..., Remote]


POOL_BYTES = (
    4 << 20
)  # unless a test needs more: the simulator writes to all of a pool when it is reserved and given back


class Linked(NamedTuple):
    """A decoder in this process that is linked to a prompt in another one."""

    prompt: Remote
    decoder: LLMDataDist
    manager: KvCacheManager


@pytest.fixture(scope="session", params=BACKENDS, ids=str)
def backend(request: pytest.FixtureRequest) -> Backend:
    use_device(request.param)
    return request.param


@pytest.fixture(scope="session")
def process() -> Iterator[Member]:
    """A process for the peer of a test."""
    with process_group() as group:
        yield DeviceMembers(group, 2, simulated_devices.HOST_VISIBLE)("peer")


@pytest.fixture(scope="session")
def more_processes() -> Iterator[list[Member]]:
    """Two more, for tests with several peers."""
    with process_group() as group:
        start = DeviceMembers(group, 3, simulated_devices.HOST_VISIBLE)
        yield [start("second peer"), start("third peer")]


@pytest.fixture
def members() -> Iterator[DeviceMembers]:
    """Start processes by name; they end with the test."""
    with process_group() as group:
        yield DeviceMembers(group, 5, simulated_devices.HOST_VISIBLE)


def set_variables(patch: pytest.MonkeyPatch) -> None:
    for name, value in {**simulated_devices.variables(0, 1), **simulated_devices.HOST_VISIBLE}.items():
        patch.setenv(name, value)


@pytest.fixture(autouse=True)
def own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process use two devices of the simulator, if a test asks for that."""
    set_variables(monkeypatch)


def use_device(chosen: Backend) -> None:
    """Have what the simulator keeps for good in a process before a test looks at what it leaves behind."""
    if chosen.device == "ascend":
        with pytest.MonkeyPatch.context() as patch:
            set_variables(patch)
            for device_id in range(2):
                Device(device_id).close()


@pytest.fixture
def options(backend: Backend, free_port: Callable[[], int]) -> Callable[..., dict[str, str]]:
    """Make options of `LLMDataDist.init` for a role, with `changes` put in, and None for a key that shall be absent."""

    def make(role: LLMRole, changes: dict[str, str | None] | None = None, **keywords: Any) -> dict[str, str]:
        port = free_port() if role is LLMRole.PROMPT else None
        keywords.setdefault("pool_bytes", POOL_BYTES)
        made = {**make_options(role, port=port, **keywords), **backend.options, **(changes or {})}
        return {key: value for key, value in made.items() if value is not None}

    return make


@pytest.fixture
def start(options: Callable[..., dict[str, str]]) -> Iterator[Start]:
    """Initialise instances of this process, one after the other; the last one is finalised with the test."""

    def start_one(role: LLMRole, cluster_id: int = DECODER, **keywords: Any) -> LLMDataDist:
        datadist = LLMDataDist(role, cluster_id)
        datadist.init(options(role, **keywords))
        return datadist

    yield start_one
    if LLMDataDist.llm_engine_instance is not None:
        LLMDataDist.llm_engine_instance.finalize()


@pytest.fixture
def manager(start: Start) -> KvCacheManager:
    """The caches of a prompt in this process."""
    return start(LLMRole.PROMPT, PROMPT).kv_cache_manager


@pytest.fixture
def start_remote(backend: Backend, free_port: Callable[[], int]) -> Iterator[StartRemote]:
    """Initialise an instance in another process; it is finalised with the test."""
    with contextlib.ExitStack() as started:

        def start_one(member: Member, role: LLMRole, cluster_id: int, **keywords: Any) -> Remote:
            port = keywords.pop("port", None) or (free_port() if role is LLMRole.PROMPT else None)
            keywords.setdefault("pool_bytes", POOL_BYTES)
            keywords["ge_options"] = {**backend.options, **keywords.get("ge_options", {})}
            remote = Remote(member, role, cluster_id, port, **keywords)
            started.callback(remote.finalize)
            return remote

        yield start_one


@pytest.fixture
def remote_prompt(process: Member, start_remote: StartRemote) -> Remote:
    """A prompt in another process, cluster 1."""
    return start_remote(process, LLMRole.PROMPT, PROMPT)


@pytest.fixture
def linked(remote_prompt: Remote, start: Start) -> Linked:
    """A decoder of this process, cluster 2, linked to the remote prompt."""
    decoder = start(LLMRole.DECODER, sync_kv_timeout=5000)
    link_to(decoder, remote_prompt)
    return Linked(remote_prompt, decoder, decoder.kv_cache_manager)


class Serving(NamedTuple):
    """A prompt in this process to which a decoder in another one is linked."""

    prompt: LLMDataDist
    manager: KvCacheManager
    decoder: Remote
    port: int


@pytest.fixture
def serving(process: Member, options: Callable[..., dict[str, str]], start_remote: StartRemote) -> Iterator[Serving]:
    """A prompt of this process, cluster 1, and a remote decoder, cluster 2, that is linked to it."""
    given = options(LLMRole.PROMPT, sync_kv_timeout=5000)
    port = int(given["llm.listenIpInfo"].split(":")[1])
    prompt = LLMDataDist(LLMRole.PROMPT, PROMPT)
    prompt.init(given)
    decoder = start_remote(process, LLMRole.DECODER, DECODER)
    assert decoder.call(dd.link, PROMPT, port) == LINKED
    yield Serving(prompt, prompt.kv_cache_manager, decoder, port)
    prompt.finalize()


# ---- cache-manager mode


@pytest.fixture(scope="session", params=MEMORY_BACKENDS, ids=str)
def memory(request: pytest.FixtureRequest) -> Backend:
    """The way to registered memory, for tests that move bytes of it."""
    use_device(request.param)
    return request.param


@pytest.fixture
def start_manager() -> Iterator[Start]:
    """Initialise instances of this process in cache-manager mode, one after the other; the last one is finalised."""

    def start_one(
        cluster_id: int = DECODER, role: LLMRole = LLMRole.MIX, more: dict[str, str] | None = None, **options: Any
    ) -> LLMDataDist:
        datadist = LLMDataDist(role, cluster_id)
        datadist.init({**registering.make_options(**options), **(more or {})})
        return datadist

    yield start_one
    if LLMDataDist.llm_engine_instance is not None:
        LLMDataDist.llm_engine_instance.finalize()


@pytest.fixture
def start_registering(process: Member, free_port: Callable[[], int]) -> Iterator[StartRemote]:
    """Initialise an instance in cache-manager mode in another process, cluster 1; it is finalised with the test."""
    with contextlib.ExitStack() as started:

        def start_one(backend: Backend, role: LLMRole = LLMRole.MIX, **options: Any) -> RegisteringRemote:
            remote = RegisteringRemote(process, backend, role, PROMPT, free_port(), **options)
            started.callback(remote.finalize)
            return remote

        yield start_one


class Registering(NamedTuple):
    """Two linked instances in cache-manager mode: one in this process, cluster 2, and one in another, cluster 1."""

    peer: RegisteringRemote
    datadist: LLMDataDist
    manager: CacheManager
    memory: Backend
    held: list[Registered]  # what this process has registered must live

    def register(self, *args: Any, **kwargs: Any) -> Registered:
        """Register fresh tensors in this process; the arguments are those of `registering.register`."""
        self.held.append(registering.register(self.datadist, self.memory, *args, **kwargs))
        return self.held[-1]


@pytest.fixture
def link_registering(
    start_registering: StartRemote, start_manager: Start, memory: Backend, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Registering]:
    """Start two instances with the same options and link them, over each way to registered memory."""

    def link(**options: Any) -> Registering:
        for name, value in memory.environment.items():
            monkeypatch.setenv(name, value)
        peer = start_registering(memory, **options)
        datadist = start_manager(more=memory.options, **options)
        assert datadist.link_clusters([dd.cluster_info(PROMPT, peer.port)]) == LINKED
        return Registering(peer, datadist, datadist.cache_manager, memory, [])

    return link


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the line of the checklist, and what a test has to say about it, into the report."""
    for item in items:
        line = re.match(r"test_(C\d{3})_", item.name)
        if line is None or not isinstance(item, pytest.Function):
            continue
        item.user_properties.append(("line", line.group(1)))
        remark = inspect.getdoc(item.function)
        if remark:
            item.user_properties.append(("remark", " ".join(remark.split())))
