"""One prompt, and many decoders on several hosts that pull at the same time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from llm_datadist.engine.engine import Engine
from llm_datadist.engine.keys import KeyKind, KeyName
from llm_datadist.engine.link import ClusterAddress
from llm_datadist.engine.options import EngineOptions
from llm_datadist.ip_address import trans_str_ip
from llm_datadist.roles import LLMRole
from llm_datadist.status import LLMStatusCode
from tests.datadist_member import payload
from tests.hosts.instances import LINKED, MIB, PORT, PROMPT
from tests.hosts.network import Network, wait_until
from tests.many_engines import allow_many_descriptors, close_engines
from tests.processes import Member

HOSTS = 4
DECODERS = 32  # on each host
ROUNDS = 3
NBYTES = 50_000
KEY: KeyName = (int(KeyKind.PREFIX), 1, 0)

State = dict


def open_prompt(state: State) -> None:
    allow_many_descriptors()
    engine = Engine(EngineOptions(LLMRole.PROMPT, PROMPT, listen=(("0.0.0.0", PORT),), pool_bytes=MIB))
    state["engines"] = {PROMPT: engine}
    cache_id, _ = engine.allocate(1, NBYTES, 1, [KEY])
    engine.tensor_memory(cache_id, 0)[0][:] = payload(1, 0, NBYTES).tobytes()


def open_decoders(state: State, first: int) -> None:
    allow_many_descriptors()
    state["engines"] = {
        cluster_id: Engine(EngineOptions(LLMRole.DECODER, cluster_id, pool_bytes=MIB))
        for cluster_id in range(first, first + DECODERS)
    }


def link_all(state: State, ip: str) -> list[tuple[LLMStatusCode, list[LLMStatusCode]]]:
    address = ClusterAddress(PROMPT, ((trans_str_ip("127.0.0.1"), 0),), ((trans_str_ip(ip), PORT),))
    with ThreadPoolExecutor(8) as threads:
        return list(threads.map(lambda engine: engine.link([address], 30_000), state["engines"].values()))


def pull_all(state: State) -> int:
    """Pull with every engine, eight at a time and each several times; gives how often the bytes were right."""
    wanted = payload(1, 0, NBYTES).tobytes()

    def pull(engine: Engine) -> int:
        cache_id, _ = engine.allocate(1, NBYTES, 1)
        right = 0
        for _ in range(ROUNDS):
            engine.tensor_memory(cache_id, 0)[0][:] = bytes(NBYTES)
            engine.pull_cache(PROMPT, KEY, cache_id, 0, -1, None, None, 0, 0, False)
            right += bytes(engine.tensor_memory(cache_id, 0)[0]) == wanted
        engine.deallocate(cache_id)
        return right

    with ThreadPoolExecutor(8) as threads:
        return sum(threads.map(pull, state["engines"].values()))


def states(state: State) -> list[str]:
    return [link.state for engine in state["engines"].values() for link in engine.describe_links()]


def in_all(members: list[Member], function: object, *args: object) -> list[object]:
    """Call a function in all members at the same time."""
    calls = [member.start(function, *args) for member in members]  # type: ignore[arg-type]
    return [call.result(90) for call in calls]


def test_many_decoders_of_one_prompt(network: Network) -> None:
    prompt_host = network.add_host("prompt")
    prompt = prompt_host.start("prompt")
    prompt.call(open_prompt)
    members = [network.add_host(f"host{number}").start(f"decoders {number}") for number in range(HOSTS)]
    for number, member in enumerate(members):
        member.call(open_decoders, 100 * (number + 1), timeout=60)
    for answers in in_all(members, link_all, prompt_host.ipv4):
        assert answers == [LINKED] * DECODERS
    assert prompt.call(states) == ["LINKED"] * (HOSTS * DECODERS)
    assert in_all(members, pull_all) == [ROUNDS * DECODERS] * HOSTS

    members[0].kill()
    alive = (HOSTS - 1) * DECODERS
    wait_until(lambda: prompt.call(states).count("LINKED") == alive, "word of the death of a host's processes")
    assert in_all(members[1:], pull_all) == [ROUNDS * DECODERS] * (HOSTS - 1)
    in_all(members[1:], close_engines)
    wait_until(lambda: "LINKED" not in prompt.call(states), "word of the end of all links")
    prompt.call(close_engines)
