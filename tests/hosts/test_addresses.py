"""How a host is called: IPv4 and IPv6 addresses, names, and all addresses at once."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from llm_datadist import LLMRole, LLMStatusCode
from tests.hosts import instances
from tests.hosts.instances import DECODER, LINKED, PORT, PROMPT, TIMEOUT_MS, Apart, answers_in_time
from tests.hosts.network import Host, Network, wait_until
from tests.integration.test_links import links

Name = Callable[[Host], str]
LISTENS: dict[str, Name] = {
    "every": lambda host: f"0.0.0.0:{PORT}",
    "ipv4": lambda host: f"{host.ipv4}:{PORT}",
    "every-v6": lambda host: f"[::]:{PORT}",
    "ipv6": lambda host: f"[{host.ipv6}]:{PORT}",
    "name": lambda host: f"{host.name}:{PORT}",
}
CALLED: dict[str, Name] = {
    "ipv4": lambda host: host.ipv4,
    "ipv6": lambda host: host.ipv6,
    "name": lambda host: host.name,
    "name-v6": lambda host: f"{host.name}-v6",
    "link-local": lambda host: f"{host.link_local}%eth0",
}
# Where a prompt listens, and how decoders call it.
GOOD = [
    ("every", "ipv4"),
    ("every", "name"),
    ("ipv4", "ipv4"),
    ("name", "name"),
    ("every-v6", "ipv6"),
    ("every-v6", "name-v6"),
    ("every-v6", "link-local"),
    ("ipv6", "ipv6"),
    ("ipv6", "name-v6"),
]


@pytest.mark.parametrize(("listens", "called"), GOOD)
def test_a_link(network: Network, listens: str, called: str) -> None:
    left, right = network.add_host("left"), network.add_host("right")
    prompt, decoder = left.start("prompt"), right.start("decoder")
    prompt.call(instances.init, LLMRole.PROMPT, PROMPT, LISTENS[listens](left))
    decoder.call(instances.init, LLMRole.DECODER, DECODER)
    # A link-local address takes a second to be sure that it is the only one.
    wait_until(lambda: decoder.call(instances.link, PROMPT, CALLED[called](left)) == LINKED, "link", 5)
    assert decoder.call(links) == [(PROMPT, "LINKED", "tcp")]
    apart = Apart(network, left, right, prompt, decoder)
    apart.assert_works(1)
    assert decoder.call(instances.unlink, PROMPT, CALLED[called](left)) == LINKED


@pytest.mark.parametrize("called", CALLED)
def test_a_host_that_is_not_there(network: Network, called: str) -> None:
    left, right = network.add_host("left"), network.add_host("right")
    left.vanish()
    decoder = right.start("decoder")
    decoder.call(instances.init, LLMRole.DECODER, DECODER)
    address = CALLED[called](left)
    overall, each = answers_in_time(TIMEOUT_MS, decoder.call, instances.link, PROMPT, address, timeout_ms=TIMEOUT_MS)
    assert overall is LLMStatusCode.LLM_LINK_FAILED
    assert each[0] in (LLMStatusCode.LLM_WAIT_PROCESS_TIMEOUT, LLMStatusCode.LLM_LINK_FAILED)


def test_another_address_of_the_host_is_not_served(network: Network) -> None:
    """A prompt that listens at its loopback is not reached from elsewhere."""
    left, right = network.add_host("left"), network.add_host("right")
    prompt, decoder = left.start("prompt"), right.start("decoder")
    prompt.call(instances.init, LLMRole.PROMPT, PROMPT, f"127.0.0.1:{PORT}")
    decoder.call(instances.init, LLMRole.DECODER, DECODER)
    assert decoder.call(instances.link, PROMPT, left.ipv4)[0] is LLMStatusCode.LLM_LINK_FAILED


def test_processes_of_one_host_still_share_memory(network: Network) -> None:
    left = network.add_host("left")
    prompt, decoder = left.start("prompt"), left.start("decoder")
    prompt.call(instances.init, LLMRole.PROMPT, PROMPT, f"0.0.0.0:{PORT}")
    decoder.call(instances.init, LLMRole.DECODER, DECODER)
    assert decoder.call(instances.link, PROMPT, left.ipv4) == LINKED
    assert decoder.call(links) == [(PROMPT, "LINKED", "shared_memory")]
    Apart(network, left, left, prompt, decoder).assert_works(1)
