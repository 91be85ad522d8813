"""The threads of a process's data servers: one for each stream that a peer has opened.

They work without the interpreter lock. One ends when its stream is closed, by the peer or with the link.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from typing import Callable

_log = logging.getLogger("llm_datadist.link")

THREAD_NAME = "llm_datadist-data"


class ServingThreads:
    """Runs a server for each stream; owns the streams' sockets on this side."""

    def __init__(self) -> None:
        self._threads: dict[threading.Thread, socket.socket] = {}
        self._lock = threading.Lock()

    def start(
        self, stream: socket.socket, serve: Callable[[int], None], on_end: Callable[[], None] | None = None
    ) -> None:
        """Serve a stream from now on; takes over the socket.

        Parameters
        ----------
        stream : socket
            What the peer asks over.
        serve : callable
            Gets the descriptor, and returns when the stream is at its end.
        on_end : callable, optional
            Called when nothing is served any more, also if the thread could not be started.
        """

        def run() -> None:
            try:
                serve(stream.fileno())
            finally:
                with self._lock:
                    del self._threads[threading.current_thread()]
                stream.close()
                if on_end is not None:
                    on_end()

        thread = threading.Thread(target=run, name=THREAD_NAME, daemon=True)
        with self._lock:
            self._threads[thread] = stream
        try:
            thread.start()
        except RuntimeError as error:
            _log.error("a data stream is not served: %s", error)
            with self._lock:
                del self._threads[thread]
            stream.close()
            if on_end is not None:
                on_end()

    def stop(self, stream: socket.socket) -> None:
        """Let the thread of a stream end."""
        try:
            stream.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it has ended, and closed its socket

    def close(self, timeout_s: float) -> bool:
        """Let all threads end; tells whether they have, in time."""
        deadline = time.monotonic() + timeout_s
        with self._lock:
            running = dict(self._threads)
        for stream in running.values():
            self.stop(stream)
        for thread in running:
            thread.join(max(0.0, deadline - time.monotonic()))
        if any(thread.is_alive() for thread in running):
            _log.error("the data servers did not end within %s s", timeout_s)
            return False
        return True
