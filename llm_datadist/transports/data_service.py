"""The data server for registered memory of this process that a peer on the same host cannot reach by itself."""

from __future__ import annotations

import os
import socket
import threading
import time

from llm_datadist._data_server import DataServer
from llm_datadist._directory import Claims, Directory
from llm_datadist._segment import Segment
from llm_datadist.transports.serving_threads import ServingThreads


class DataService:
    """Serves channels from registered memory of this process; nothing is opened before the first channel.

    Parameters
    ----------
    pool : Segment
        The device's pool.
    directory : Directory
        Caches of this process.
    lock : threading.Lock
        Guards the directory.
    threads : ServingThreads
        Of the engine.
    """

    def __init__(self, pool: Segment, directory: Directory, lock: threading.Lock, threads: ServingThreads) -> None:
        self._pool = pool
        self._directory = directory
        self._lock = lock
        self._threads = threads
        self._server: DataServer | None = None
        self._claims: Claims | None = None

    def serve(self, channel: socket.socket) -> None:
        """Serve a channel from now on; takes over the socket. In the control thread."""
        if self._server is None:
            self._server = self._open()
        self._threads.start(channel, self._server.serve)

    def stop(self, channel: socket.socket) -> None:
        """Let the thread of a channel end."""
        self._threads.stop(channel)

    def close(self) -> None:
        """Give up what the server sees; its threads have ended."""
        if self._server is not None and self._claims is not None:
            self._server.close(time.monotonic_ns())
            with self._lock:
                self._directory.drop_claims(self._claims)
            self._server = self._claims = None

    def _open(self) -> DataServer:
        """Look at the own directory as a peer does, with a claim page of its own."""
        claims = Claims()
        parts = (
            (self._pool, False),
            (self._directory.segment, False),
            (self._directory.ledger, True),
            (claims.segment, True),
        )
        segments = [Segment.attach(os.dup(part.fileno()), writable=writable) for part, writable in parts]
        pool, directory, ledger, page = segments
        server = DataServer(pool, directory, ledger, page)
        with self._lock:
            self._directory.add_claims(claims)
        self._claims = claims
        return server
