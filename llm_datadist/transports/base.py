"""The interface of a transport: what a link offers to the engine, however the bytes move."""

from __future__ import annotations

import socket
from typing import Callable, Protocol

from llm_datadist._local import BlockPairs, LocalCache


class End(Protocol):
    """One end of a link: what this process does to its peer.

    Transfers may run in several threads at once. A failed one raises `llm_datadist._core.TransferFault`.
    """

    name: str

    @property
    def busy(self) -> bool:
        """Whether a transfer of this process is running."""

    @property
    def dead(self) -> bool:
        """Whether the peer was found dead."""

    @property
    def private_memory(self) -> str | None:
        """The way to registered memory of the peer; None if the link has none."""

    def open_channel(self, connection: socket.socket) -> None:
        """See to it that transfers have what they need of the peer to reach its registered memory."""

    def add_channel(self, descriptor: int) -> None:
        """Take over a stream to the data server of the peer; raises ValueError if there is no use for it."""

    def begin_preparing(self, on_end: Callable[[], None]) -> None:
        """See to it that there is what transfers need beside the connections; does not block.

        `on_end` is called once, in any thread, when it is there or is not to be had; `prepare` tells which.
        """

    def prepare(self, deadline_ns: int) -> None:
        """Have what transfers need beside the connections, by the deadline (monotonic clock).

        Raises
        ------
        OSError
            It is not to be had; socket.timeout: not yet.
        """

    def use_threads(self, threads: int) -> None:
        """Let one copy use so many threads, the caller's included."""

    def mark_dead(self) -> None:
        """Let running and later transfers fail at once: the peer is gone."""

    def begin_close(self) -> bool:
        """Let no new transfer start; False, and nothing changed, if one is running."""

    def reopen(self) -> None:
        """Take `begin_close` back."""

    def close(self, deadline_ns: int) -> bool:
        """End running transfers and close; tells whether everything ended by the deadline (monotonic clock)."""

    def pull_cache(
        self,
        target: LocalCache,
        kind: int,
        key_id: int,
        model_id: int,
        remote_slot: int,
        local_slot: int,
        nbytes: int,
        source_first: int,
        source_count: int,
        target_first: int,
        target_count: int,
        source_offset: int,
        target_offset: int,
        consume: bool,
        deadline_ns: int,
    ) -> None:
        """Copy a part of one remote slot into one local slot; a source count of -1 means all tensors."""

    def pull_blocks(
        self,
        target: LocalCache,
        kind: int,
        key_id: int,
        model_id: int,
        remote_slot: int,
        pairs: BlockPairs,
        source_first: int,
        source_count: int,
        target_first: int,
        target_count: int,
        token: bytes | None,
        deadline_ns: int,
    ) -> None:
        """Copy remote blocks into local blocks; of a remote slot, parts of the size of a local block."""

    def push(
        self,
        source: LocalCache,
        source_first: int,
        addresses: list[int],
        source_slot: int,
        pairs: BlockPairs | None,
        block_nbytes: int,
        deadline_ns: int,
    ) -> None:
        """Copy a slot, or blocks, of local tensors to addresses in the peer's process."""

    def push_to_key(
        self,
        source: LocalCache,
        source_first: int,
        tensors: int,
        source_slot: int,
        kind: int,
        key_id: int,
        model_id: int,
        remote_slot: int,
        target_first: int,
        pairs: BlockPairs | None,
        block_nbytes: int,
        deadline_ns: int,
    ) -> None:
        """Copy a slot, or blocks, of local tensors into the remote cache that a key names."""


class Grant(Protocol):
    """The other end of a link: what this process lets one peer do to its caches."""

    name: str

    def serve(self, descriptor: int) -> None:
        """Serve a stream that the peer has opened, or was given; takes over the descriptor."""

    def offer_by(self, offer: Callable[[], None]) -> None:
        """Say how `offer_channel` gets a stream; for the side that makes them."""

    def offer_channel(self) -> None:
        """Give the peer a stream of its own to ask over, if it is this side that makes them; does not block."""

    @property
    def busy(self) -> bool:
        """Whether the peer uses the caches right now."""

    def revoke(self) -> None:
        """End the grant: the peer's claims no longer hold memory, and the peer can find that out. Idempotent."""
