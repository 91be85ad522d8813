"""The data server of a process: a thread for each channel that a peer has opened.

The threads work without the interpreter lock. One ends when its channel is closed, by the peer or with the link.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time

from llm_datadist._data_server import DataServer
from llm_datadist._directory import Claims, Directory
from llm_datadist._segment import Segment

_log = logging.getLogger("llm_datadist.link")

THREAD_NAME = "llm_datadist-data"


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
    """

    def __init__(self, pool: Segment, directory: Directory, lock: threading.Lock) -> None:
        self._pool = pool
        self._directory = directory
        self._lock = lock
        self._server: DataServer | None = None
        self._claims: Claims | None = None
        self._threads: dict[threading.Thread, socket.socket] = {}
        self._threads_lock = threading.Lock()

    def serve(self, channel: socket.socket) -> None:
        """Serve a channel from now on; takes over the socket. In the control thread."""
        if self._server is None:
            self._server = self._open()
        server = self._server

        def run() -> None:
            try:
                server.serve(channel.fileno())
            finally:
                with self._threads_lock:
                    del self._threads[threading.current_thread()]
                channel.close()

        thread = threading.Thread(target=run, name=THREAD_NAME, daemon=True)
        with self._threads_lock:
            self._threads[thread] = channel
        try:
            thread.start()
        except RuntimeError as error:
            _log.error("a data channel is not served: %s", error)
            with self._threads_lock:
                del self._threads[thread]
            channel.close()

    def stop(self, channel: socket.socket) -> None:
        """Let the thread of a channel end."""
        try:
            channel.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it has ended, and closed its socket

    def close(self, timeout_s: float) -> bool:
        """Let all threads end; tells whether they have, in time."""
        deadline = time.monotonic() + timeout_s
        with self._threads_lock:
            running = dict(self._threads)
        for channel in running.values():
            self.stop(channel)
        for thread in running:
            thread.join(max(0.0, deadline - time.monotonic()))
        if any(thread.is_alive() for thread in running):
            _log.error("the data server did not end within %s s", timeout_s)
            return False
        if self._server is not None and self._claims is not None:
            self._server.close(time.monotonic_ns())
            with self._lock:
                self._directory.drop_claims(self._claims)
            self._server = self._claims = None
        return True

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
