"""A connector that links through communicators, in the manner of vLLM's KV connectors.

A prefill serves what others need to know of it over a socket of its own. A decoder says hello there; then both make the
rank table of the pair from what they know of each other and call `link` from a thread of a pool. The decoder pulls the
blocks of a request into blocks that it has chosen itself. When pulls go wrong it tries again, and at last links anew
under the same name.
"""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import msgpack
import zmq

from llm_datadist import (
    BlocksCacheKey,
    LLMConfig,
    LLMDataDist,
    LLMException,
    LLMRole,
    LLMStatusCode,
    RegisterMemStatus,
)
from tests.clients.kv_tensors import KvTensors

HOST = "127.0.0.1"
LINK_DEADLINE_S = 10.0
PULL_ATTEMPTS = 3  # on one link
POLL_S = 0.002

# Worth another try: somebody else uses the link, or the peer was too slow.
TRY_AGAIN = (LLMStatusCode.LLM_LINK_BUSY, LLMStatusCode.LLM_TIMEOUT)
# Worth a new link.
LINK_ANEW = (*TRY_AGAIN, LLMStatusCode.LLM_NOT_YET_LINK)

Agent = dict[str, Any]


class LinkNotMade(Exception):
    """A communicator failed, or was not complete in time."""


class TwoSidedConnector:
    """One process of a deployment.

    Parameters
    ----------
    role : LLMRole
        PROMPT serves its metadata, DECODER asks for that of others.
    cluster_id, device_id : int
        Of this process, as others know them.
    caches : list of KvTensors
        Registered under the model ids 0, 1, ...
    sync_kv_timeout : int
        Milliseconds that a pull may take.
    """

    def __init__(
        self, role: LLMRole, cluster_id: int, device_id: int, caches: list[KvTensors], sync_kv_timeout: int = 5000
    ) -> None:
        config = LLMConfig()
        config.device_id = 0  # the only one that this process sees; the rank table has its number on the server
        config.sync_kv_timeout = sync_kv_timeout
        config.enable_switch_role = True
        config.enable_cache_manager = True
        config.enable_remote_cache_accessible = True
        self.caches = caches
        self.events: list[str] = []  # what went wrong, and what was done about it
        self.agent: Agent = {
            "role": int(role),
            "cluster_id": cluster_id,
            "server_id": HOST,
            "device_id": str(device_id),
            "device_ip": f"10.0.0.{device_id + 1}",
        }
        self._datadist = LLMDataDist(role, cluster_id)
        self._datadist.init(config.generate_options())
        self._manager = self._datadist.cache_manager
        self._handles = [
            self._manager.register_blocks_cache(cache.desc, cache.addresses, BlocksCacheKey(cluster_id, model_id))
            for model_id, cache in enumerate(caches)
        ]
        self._threads = ThreadPoolExecutor(4, "linking")
        self._communicators: dict[str, int] = {}
        self._links_of_peers: list[Future[int]] = []  # made because somebody said hello
        self._peers: dict[int, Future[int]] = {}  # cluster ids by the port of their metadata
        self._locks: dict[str, threading.Lock] = {}
        self._guard = threading.Lock()  # of _peers and _locks
        self._context = zmq.Context()
        self._server: threading.Thread | None = None
        self._stop = threading.Event()

    def close(self) -> None:
        self._stop.set()
        if self._server is not None:
            self._server.join()
        self._threads.shutdown()
        for link in self._links_of_peers:
            link.result()
        self._context.destroy(linger=0)
        for communicator in self._communicators.values():
            self._datadist.unlink(communicator)
        for handle in self._handles:
            self._manager.unregister_cache(handle.cache_id)
        self._datadist.finalize()

    # ---- metadata of a prefill

    def serve(self, port: int) -> None:
        """Answer hellos at a port, in a thread, until `close`."""
        socket = self._context.socket(zmq.ROUTER)
        socket.bind(f"tcp://{HOST}:{port}")
        self._server = threading.Thread(target=self._answer, args=(socket,), name="metadata")
        self._server.start()

    def _answer(self, socket: zmq.Socket[bytes]) -> None:
        while not self._stop.is_set():
            if socket.poll(20):
                sender, text = socket.recv_multipart()
                self._links_of_peers.append(self._threads.submit(self._link, msgpack.unpackb(text)))
                socket.send_multipart([sender, msgpack.packb(self.agent)])
        socket.close(linger=0)

    # ---- links, the same on both sides

    def connect(self, port: int) -> Future[int]:
        """Link to the prefill whose metadata are served at a port, unless that was done; gives its cluster id."""
        with self._guard:
            connected = self._peers.get(port)
            if connected is None:
                connected = self._peers[port] = self._threads.submit(self._connect, port)
        return connected

    def _forget(self, port: int, connected: Future[int]) -> None:
        """Have the next pull connect again, unless another one has done so already."""
        with self._guard:
            if self._peers.get(port) is connected:
                del self._peers[port]

    def _connect(self, port: int) -> int:
        agent = self._say_hello(port)
        communicator = self._link(agent)
        deadline = time.monotonic() + LINK_DEADLINE_S
        while (status := self._datadist.query_register_mem_status(communicator)) is RegisterMemStatus.PREPARING:
            if time.monotonic() > deadline:
                break
            time.sleep(POLL_S)
        if status is not RegisterMemStatus.OK:
            raise LinkNotMade(f"link to {agent}: {status}")
        return agent["cluster_id"]

    def _say_hello(self, port: int) -> Agent:
        """Exchange metadata with a prefill. If it is not there yet, ZeroMQ delivers the hello when it comes."""
        with self._context.socket(zmq.DEALER) as socket:
            socket.linger = 0
            socket.connect(f"tcp://{HOST}:{port}")
            socket.send(msgpack.packb(self.agent))
            if socket.poll(int(LINK_DEADLINE_S * 1000)):
                return msgpack.unpackb(socket.recv())
        raise LinkNotMade(f"nobody serves metadata at port {port}")

    def _link(self, other: Agent) -> int:
        """Join the communicator of this process and another; one of the same name from before is left."""
        pair = sorted((self.agent, other), key=lambda agent: agent["role"])  # prefill is rank 0
        name = f"pd_{pair[0]['cluster_id']}_{pair[1]['cluster_id']}"
        with self._lock_of(name):
            self._unlink(name)
            ranks = {agent["cluster_id"]: rank for rank, agent in enumerate(pair)}
            communicator = self._datadist.link(name, ranks, make_rank_table(pair))
            self._communicators[name] = communicator
        return communicator

    def _unlink(self, name: str) -> None:
        communicator = self._communicators.pop(name, None)
        if communicator is None:
            return
        deadline = time.monotonic() + LINK_DEADLINE_S
        while True:
            try:
                self._datadist.unlink(communicator)
            except LLMException as error:
                if error.status_code is LLMStatusCode.LLM_LINK_BUSY and time.monotonic() < deadline:
                    continue
                raise
            return

    def _lock_of(self, name: str) -> threading.Lock:
        with self._guard:
            return self._locks.setdefault(name, threading.Lock())

    # ---- pulls of a decoder

    def pull(self, port: int, remote_blocks: list[int], local_blocks: list[int]) -> None:
        """Pull blocks of every cache from the prefill at a port, and link to it first if need be."""
        for _ in range(2):
            connected = self.connect(port)
            try:
                if self._pull_on_this_link(connected.result(), remote_blocks, local_blocks):
                    return
            except LinkNotMade as error:
                self.events.append(str(error))
            self.events.append("link anew")
            self._forget(port, connected)
        raise LinkNotMade(f"no pull succeeds from port {port}: {self.events}")

    def _pull_on_this_link(self, cluster_id: int, remote_blocks: list[int], local_blocks: list[int]) -> bool:
        for _ in range(PULL_ATTEMPTS):
            try:
                for model_id, handle in enumerate(self._handles):
                    key = BlocksCacheKey(cluster_id, model_id)
                    self._manager.pull_blocks(key, handle, remote_blocks, local_blocks)
            except LLMException as error:
                self.events.append(error.status_code.name)
                if error.status_code not in LINK_ANEW:
                    raise
                if error.status_code not in TRY_AGAIN:
                    return False
            else:
                return True
        return False


def make_rank_table(agents: list[Agent]) -> str:
    """Write the rank table of processes, in the order of their ranks; those of one server share an entry."""
    servers: dict[str, list[dict[str, str]]] = {}
    for rank, agent in enumerate(agents):
        device = {"device_id": agent["device_id"], "device_ip": agent["device_ip"], "rank_id": str(rank)}
        servers.setdefault(agent["server_id"], []).append(device)
    return json.dumps(
        {
            "version": "1.0",
            "server_count": str(len(servers)),
            "server_list": [{"server_id": server, "device": devices} for server, devices in servers.items()],
            "status": "completed",
        }
    )
