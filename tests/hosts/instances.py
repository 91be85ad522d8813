"""Instances on the hosts of a network, and links between them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from llm_datadist import CacheKey, LLMClusterInfo, LLMDataDist, LLMException, LLMRole, LLMStatusCode
from tests import datadist_member as dd
from tests.conformance.expectations import LINKED, LITTLE_S, outcome
from tests.hosts.network import Host, Network, wait_until
from tests.integration.test_links import links
from tests.processes import Member

PROMPT, DECODER, ANOTHER_DECODER = 1, 2, 3  # cluster ids
PORT = 26000  # nobody else is on a host
TIMEOUT_MS = 2000  # of calls that shall fail
ENOUGH_MS = 20_000  # of calls that shall succeed
TCP = "tcp"
MIB = 1 << 20

OK = LLMStatusCode.LLM_SUCCESS
TIMEOUT = LLMStatusCode.LLM_WAIT_PROCESS_TIMEOUT
NOT_EXIST = LLMStatusCode.LLM_KV_CACHE_NOT_EXIST


class Apart(NamedTuple):
    """A prompt on one host, and a decoder on another one that is linked to it."""

    network: Network
    prompt_host: Host
    decoder_host: Host
    prompt: Member
    decoder: Member

    def link(self, timeout_ms: int = ENOUGH_MS) -> Any:
        return self.decoder.call(link, PROMPT, self.prompt_host.ipv4, timeout_ms=timeout_ms)

    def unlink(self, timeout_ms: int = ENOUGH_MS, force: bool = False) -> Any:
        return self.decoder.call(unlink, PROMPT, self.prompt_host.ipv4, timeout_ms=timeout_ms, force=force)

    def offer(self, req_id: int, seed: int, nbytes: int = 4096, tensors: int = 2) -> int:
        """Offer a cache under an ordinary key, which one pull consumes."""
        return offer(self.prompt, CacheKey(PROMPT, req_id), seed, nbytes, tensors)

    def pull_and_compare(self, req_id: int, seed: int, nbytes: int = 4096, tensors: int = 2) -> None:
        pull_and_compare(self.decoder, CacheKey(PROMPT, req_id), seed, nbytes, tensors)

    def assert_works(self, req_id: int) -> None:
        """Expect that a pull brings what it should and consumes its key."""
        cache = self.offer(req_id, req_id)
        self.pull_and_compare(req_id, req_id)
        with pytest.raises(LLMException) as caught:
            self.pull_and_compare(req_id, req_id)
        assert caught.value.status_code is NOT_EXIST
        self.prompt.call(dd.deallocate, cache)

    def wait_until_it_works(self, req_id: int) -> None:
        """Wait until a pull succeeds, over the link as it is or over a new one, however often it must be made."""
        self.offer(req_id, req_id)

        def works() -> bool:
            code = outcome(self.pull_and_compare, req_id, req_id)
            if code is not OK:
                assert code in (TIMEOUT, LLMStatusCode.LLM_NOT_YET_LINK)
                self.unlink(TIMEOUT_MS)
                self.link(TIMEOUT_MS)
            return code is OK

        wait_until(works, "link that works", 60)

    def wait_until_the_link_works(self, req_id: int) -> None:
        """Wait until a pull succeeds over the link as it is: nobody takes it down or makes another one."""
        self.offer(req_id, req_id)
        wait_until(lambda: outcome(self.pull_and_compare, req_id, req_id) is OK, "link that works again")

    def with_another_decoder(self, host: Host) -> Apart:
        """Start a further decoder of the same prompt and link it."""
        decoder = host.start("another decoder")
        decoder.call(init, LLMRole.DECODER, ANOTHER_DECODER, pool_bytes=100 * MIB)
        other = self._replace(decoder_host=host, decoder=decoder)
        assert other.link() == LINKED
        return other


def start_apart(network: Network, decoder_host: Host, prompt_host: Host, **options: Any) -> Apart:
    """Start a prompt and a decoder with the same options, not linked yet."""
    prompt, decoder = prompt_host.start("prompt"), decoder_host.start("decoder")
    prompt.call(init, LLMRole.PROMPT, PROMPT, f"0.0.0.0:{PORT}", **options)
    decoder.call(init, LLMRole.DECODER, DECODER, **options)
    return Apart(network, prompt_host, decoder_host, prompt, decoder)


def link_apart(network: Network, **options: Any) -> Apart:
    """Make two hosts with cables, and link a decoder on one to a prompt on the other."""
    prompt_host, decoder_host = network.add_host("left"), network.add_host("right")
    apart = start_apart(network, decoder_host, prompt_host, **options)
    assert apart.link() == LINKED
    return apart


# ---- in members


def init(state: dd.State, role: LLMRole, cluster_id: int, listen: str | None = None, **options: Any) -> None:
    """Initialise an instance that listens at an address, if one is given."""
    made = dd.make_options(role, port=PORT, **{"sync_kv_timeout": ENOUGH_MS, **options})
    if listen is not None:
        made["llm.listenIpInfo"] = listen
    datadist = LLMDataDist(role, cluster_id)
    datadist.init(made)
    state.update(datadist=datadist, caches={})


def link(state: dd.State, cluster_id: int, address: str, port: int = PORT, timeout_ms: int = ENOUGH_MS) -> Any:
    return state["datadist"].link_clusters([cluster_at(cluster_id, address, port)], timeout_ms)


def unlink(
    state: dd.State, cluster_id: int, address: str, port: int = PORT, timeout_ms: int = ENOUGH_MS, force: bool = False
) -> Any:
    return state["datadist"].unlink_clusters([cluster_at(cluster_id, address, port)], timeout_ms, force)


def cluster_at(cluster_id: int, address: str, port: int = PORT) -> LLMClusterInfo:
    info = LLMClusterInfo()
    info.remote_cluster_id = cluster_id
    info.append_local_ip_info("127.0.0.1", 0)
    info.append_remote_ip_info(address, port)
    return info


# ---- in the test


def offer(prompt: Member, key: CacheKey, seed: int, nbytes: int = 4096, tensors: int = 2) -> int:
    cache = prompt.call(dd.allocate, tensors, (1, nbytes), keys=[key])
    prompt.call(dd.fill, cache, seed)
    return int(cache)


def pull_and_compare(decoder: Member, key: Any, seed: int, nbytes: int = 4096, tensors: int = 2) -> None:
    """Pull into a fresh cache, compare every byte, and give the cache back."""
    cache = decoder.call(dd.allocate, tensors, (1, nbytes))
    try:
        decoder.call(dd.pull_cache, key, cache)
        assert_bytes(decoder, cache, seed, nbytes, tensors)
    finally:
        decoder.call(dd.deallocate, cache)


def assert_bytes(member: Member, cache: int, seed: int, nbytes: int, tensors: int = 2) -> None:
    for tensor in range(tensors):
        assert member.call(dd.read, cache, tensor) == dd.payload(seed, tensor, nbytes).tobytes()


def fails_in_time(code: LLMStatusCode, timeout_ms: int, function: Callable[..., Any], *args: Any) -> None:
    """Expect a call to raise a code, no later than its timeout and a little."""
    started = time.monotonic()
    with pytest.raises(LLMException) as caught:
        function(*args)
    assert time.monotonic() - started < timeout_ms / 1000 + LITTLE_S
    assert caught.value.status_code is code, caught.value


def answers_in_time(most_ms: int, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Give the answer of a call, which must come no later than its timeout and a little."""
    started = time.monotonic()
    answer = function(*args, **kwargs)
    assert time.monotonic() - started < most_ms / 1000 + LITTLE_S
    return answer


def wait_for_states(member: Member, states: list[str], seconds: float = 20.0) -> None:
    wait_until(lambda: [state for _, state, _ in member.call(links)] == states, f"links that are {states}", seconds)
