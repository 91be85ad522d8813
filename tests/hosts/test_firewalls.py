"""Hosts that let nobody in but through a few ports."""

from __future__ import annotations

import pytest

from llm_datadist import LLMException, LLMRole, LLMStatusCode
from tests.hosts import instances
from tests.hosts.instances import DECODER, LINKED, PORT, PROMPT, TIMEOUT_MS, Apart, answers_in_time, start_apart
from tests.hosts.network import Host, Network
from tests.hosts.test_strangers import open_ports
from tests.integration.test_transfer import results, target, transfer

RANGE = "26100-26103"
PORTS = {"llm.DataPorts": RANGE}


@pytest.fixture
def hosts(network: Network) -> tuple[Host, Host]:
    return network.add_host("left"), network.add_host("right")


def test_two_openings_at_the_prompt_are_enough(network: Network, hosts: tuple[Host, Host]) -> None:
    """Everything goes through connections that the decoder makes, transfers to it as well."""
    left, right = hosts
    left.open_only(str(PORT), RANGE)
    right.open_only()
    apart = start_apart(network, right, left, ge_options=PORTS)
    assert apart.link() == LINKED
    apart.assert_works(1)
    cache = apart.offer(2, 2)
    _, addrs = target(apart.decoder, 2, (1, 4096))
    apart.prompt.call(transfer, cache, [(DECODER, addrs, None, 0)])
    assert apart.prompt.call(results) == [LLMStatusCode.LLM_SUCCESS]


def test_a_data_port_that_is_shut(network: Network, hosts: tuple[Host, Host]) -> None:
    """The call says so in time; nothing is half linked."""
    left, right = hosts
    left.open_only(str(PORT))
    apart = start_apart(network, right, left)
    code, _ = answers_in_time(TIMEOUT_MS, apart.link, TIMEOUT_MS)
    assert code is LLMStatusCode.LLM_LINK_FAILED
    left.open_only(str(PORT), "1024-65535")
    assert apart.link() == LINKED
    apart.assert_works(1)


def test_a_range_of_data_ports(hosts: tuple[Host, Host]) -> None:
    """Each prompt takes one of the range; when none is left, init says so."""
    left, _ = hosts
    for number in range(4):
        prompt = left.start(f"prompt {number}")
        prompt.call(instances.init, LLMRole.PROMPT, PROMPT, f"0.0.0.0:{PORT + number}", ge_options=PORTS)
    assert open_ports(left) == [*range(PORT, PORT + 4), *range(26100, 26104)]
    late = left.start("one too many")
    with pytest.raises(LLMException, match="26100 to 26103") as caught:
        late.call(instances.init, LLMRole.PROMPT, PROMPT, f"0.0.0.0:{PORT + 4}", ge_options=PORTS)
    assert caught.value.status_code is LLMStatusCode.LLM_FAILED


@pytest.mark.parametrize("named", ["address", "interface"])
def test_an_address_for_data(network: Network, hosts: tuple[Host, Host], named: str) -> None:
    """Links are accepted at one address, data at another one of the host."""
    left, right = hosts
    left.namespace.run("ip", "address", "add", "10.77.0.101/24", "dev", "eth0")
    left.namespace.run("ip", "link", "add", "data0", "link", "eth0", "type", "macvlan", "mode", "bridge")
    left.namespace.run("ip", "address", "add", "10.77.0.102/24", "dev", "data0")
    left.namespace.run("ip", "link", "set", "data0", "up")
    value, ip = {"address": ("10.77.0.101",) * 2, "interface": ("data0", "10.77.0.102")}[named]
    prompt, decoder = left.start("prompt"), right.start("decoder")
    prompt.call(instances.init, LLMRole.PROMPT, PROMPT, f"{left.ipv4}:{PORT}", ge_options={"llm.DataAddress": value})
    decoder.call(instances.init, LLMRole.DECODER, DECODER)
    apart = Apart(network, left, right, prompt, decoder)
    assert apart.link() == LINKED
    apart.assert_works(1)
    listening = left.namespace.run("ss", "-Hltn")
    assert f"{left.ipv4}:{PORT} " in listening
    assert f"{ip}:" in listening
    assert "0.0.0.0" not in listening.replace("0.0.0.0:*", "")
