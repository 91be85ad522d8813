"""A FAKE of a stream of torch_npu and of its events, with the queue between a program and the device.

It is no device and no part of torch; it shows one thing that torch_npu does. What a program launches, records of events
included, stands in a queue of the host first, which a second thread empties into the queue of the device. So an event
that was just recorded may not have reached the device, and the device says of an event that it does not know that it is
complete. Here a test moves both queues by hand.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

PATIENCE_S = 10.0


class FakeStream:
    """A stream whose queues stand still until `pass_on` and `compute` are called."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self._launched: deque[Callable[[], None]] = deque()  # queue of the host
        self._given: deque[Callable[[], None]] = deque()  # queue of the device
        self._queries = 0

    def launch(self, work: Callable[[], None]) -> None:
        """Give work to the stream, as an operator of a model does."""
        with self.changed:
            self._launched.append(work)

    def pass_on(self) -> None:
        """Do what torch_npu's second thread does: all that was launched reaches the device."""
        with self.changed:
            while self._launched:
                self._given.append(self._launched.popleft())
            self.changed.notify_all()

    def compute(self, tasks: int | None = None) -> None:
        """Do what the device does: carry out the next tasks, or all."""
        with self.changed:
            for _ in range(len(self._given) if tasks is None else tasks):
                self._given.popleft()()
            self.changed.notify_all()

    def note_query(self) -> None:
        with self.changed:
            self._queries += 1
            self.changed.notify_all()

    def wait_for_queries(self, more: int) -> None:
        """Wait until somebody has asked events of this stream some times more."""
        with self.changed:
            wanted = self._queries + more
            assert self.changed.wait_for(lambda: self._queries >= wanted, PATIENCE_S)


class FakeEvent:
    """Has what a `torch.npu.Event` has, as far as it matters here."""

    def __init__(self, stream: FakeStream) -> None:
        self._stream = stream
        self._recorded = self._passed_on = self._complete = False

    def record(self, stream: FakeStream | None = None) -> None:
        self._stream = stream or self._stream
        self._recorded = True
        self._stream.launch(self._set_complete)

    def query(self) -> bool:
        """As torch answers: it knows of records that wait in the queue of the host."""
        self._stream.note_query()
        return self._complete or not self._recorded

    def raw_query(self) -> bool:
        """As the device answers of the handle: of a record that it has not seen it knows nothing."""
        with self._stream.changed:
            known = any(getattr(task, "__self__", None) is self for task in self._stream._given)
        return not known or self._complete

    def synchronize(self) -> Any:
        raise AssertionError("a wait without limit")

    wait = synchronize

    def _set_complete(self) -> None:
        self._complete = True
