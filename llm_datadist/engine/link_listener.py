"""Where this process accepts links, and how that changes while it lives."""

from __future__ import annotations

import threading

from llm_datadist.control.loop import ControlLoop
from llm_datadist.engine.failures import failure
from llm_datadist.engine.grants import Grants
from llm_datadist.engine.link import Identity
from llm_datadist.engine.link_server import LinkServer
from llm_datadist.engine.link_table import LinkTable
from llm_datadist.engine.network import Network
from llm_datadist.status import LLMStatusCode

Address = tuple[str, int]


class LinkListener:
    """Accepts links at one address or at none.

    Parameters
    ----------
    loop : ControlLoop
        Carries the messages.
    identity : Identity
        Of this process.
    grants : Grants
        Makes what a client may reach.
    table : LinkTable
        Takes the links.
    network : Network
        Which transports may be used, and where data connections are accepted.
    """

    def __init__(
        self, loop: ControlLoop, identity: Identity, grants: Grants, table: LinkTable, network: Network
    ) -> None:
        self._loop = loop
        self._identity = identity
        self._grants = grants
        self._table = table
        self._network = network
        self._address: Address | None = None
        self._server: LinkServer | None = None
        self._moving = threading.Lock()  # held while the address changes

    def listen(self, address: Address) -> None:
        """Begin to accept links; raises LLM_FAILED if the address cannot be bound."""
        server = self._new_server()
        server.start(*address)
        self._server, self._address = server, address

    def move(self, call: str, address: Address | None, *, may_change: bool = True) -> None:
        """Accept links at another address, or nowhere, from now on.

        Parameters
        ----------
        call : str
            Name of the call that wants this, for messages.
        address : (str, int) or None
            The new address, or that of now.
        may_change : bool
            Whether it may be another address than now.

        Raises
        ------
        LLMException
            LLM_EXIST_LINK: links exist. LLM_FEATURE_NOT_ENABLED: `may_change`. LLM_FAILED: the address cannot be
            bound. Everything is as before then.
        """
        with self._moving:
            self._require_no_links(call)
            if address == self._address:
                return
            if not may_change:
                reason = (
                    f"the listening address cannot change from {self._address} to {address} with a transfer backend"
                )
                raise failure(call, LLMStatusCode.LLM_FEATURE_NOT_ENABLED, reason)
            server = None
            if address is not None:
                server = self._new_server()
                server.bind(*address)
            try:
                self._replace(call, server)
            except BaseException:
                if server is not None:
                    server.discard()
                raise
            self._address = address

    def _replace(self, call: str, server: LinkServer | None) -> None:
        old = self._server
        decided = threading.Lock()  # taken by the change, or by the wait for it when it ends first

        # Links are accepted in the control thread: seen from there, none can appear between the look and the move.
        def replace() -> None:
            if not decided.acquire(blocking=False):
                return
            self._require_no_links(call)
            if old is not None:
                old.close()
            if server is not None:
                server.serve()
            self._server = server

        try:
            self._loop.ask(replace)
        except TimeoutError as error:
            if decided.acquire(blocking=False):
                raise failure(call, LLMStatusCode.LLM_FAILED, str(error)) from error
        if old is not None:
            old.wait_until_closed()

    def _require_no_links(self, call: str) -> None:
        if self._table.in_use():
            reason = f"{len(self._table)} links exist, unlink them all first"
            raise failure(call, LLMStatusCode.LLM_EXIST_LINK, reason)

    def _new_server(self) -> LinkServer:
        return LinkServer(self._loop, self._identity, self._grants, self._table, self._network)

    def close(self) -> None:
        """Stop listening. The control loop has ended."""
        if self._server is not None:
            self._server.close()
