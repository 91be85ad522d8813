"""A handshake that runs in the control thread: goes on whenever something has arrived on its connection."""

from __future__ import annotations

import socket
from typing import Callable, Union

from llm_datadist.control.loop import ControlLoop
from llm_datadist.engine.link import Link
from llm_datadist.engine.steps import WRITABLE, Steps, Wait

# What a handshake ends with: a link, nothing, or what went wrong.
Ending = Union[Link, None, Exception]


class Conversation:
    """One connection and the steps of a handshake on it. Everything in here runs in the control thread.

    Parameters
    ----------
    loop : ControlLoop
        Watches the connection.
    connection : socket
        Does not block. Closed at the end, unless a link comes out, which has it then.
    on_end : callable
        Told once how the handshake ended; not after `close`.
    """

    def __init__(self, loop: ControlLoop, connection: socket.socket, on_end: Callable[[Ending], None]) -> None:
        self.connection = connection
        self.is_open = True
        self._loop = loop
        self._on_end = on_end
        self._steps: Steps[Link | None] | None = None
        self._watched_for: Wait | None = None

    def start(self, steps: Steps[Link | None]) -> None:
        """Go through the steps as far as possible now, and with the rest as the other side answers."""
        self._steps = steps
        self._loop.watch(self.connection, self.go_on)
        self.go_on()

    def go_on(self) -> None:
        """Let the steps look whether they can go on; does nothing after the end."""
        if not self.is_open:
            return
        assert self._steps is not None
        try:
            wanted = next(self._steps)
        except StopIteration as stop:
            self._end(stop.value)
        except Exception as error:
            self._end(error)
        else:
            self._watch_for(wanted)

    def _watch_for(self, wanted: Wait | None) -> None:
        if wanted is self._watched_for:
            return
        self._watched_for = wanted
        self._loop.unwatch(self.connection)
        watch = self._loop.watch_writable if wanted is WRITABLE else self._loop.watch
        watch(self.connection, self.go_on)

    def _end(self, ending: Ending) -> None:
        if not self.is_open:
            return
        self.is_open = False
        self._loop.unwatch(self.connection)
        if not isinstance(ending, Link):
            self.connection.close()
        self._on_end(ending)

    def close(self) -> None:
        """Break off; may be called twice, but not from a step."""
        if not self.is_open:
            return
        self.is_open = False
        self._loop.unwatch(self.connection)
        if self._steps is not None:
            self._steps.close()
        self.connection.close()
