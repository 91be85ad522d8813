"""Makes the communicator of a link, when the link is made and whenever it was lost.

Either end may begin, over a data connection of its own. What they tell each other, and the steps in which both then
make it, are the business of a way (`two_sided`, `one_sided`); after each step they tell each other how it went.

    begins              MAKE_COMMUNICATOR, CommunicatorWish
    asked               CommunicatorOffer: busy, refused, or what both need
    both, for each step carry it out, CommunicatorMade

What waits for HCCL runs in a thread of its own. Who wants the communicator gives up at its deadline; the thread goes
on, so that the next transfer may find what it has made. HCCL cannot be told to give up: a thread whose peer is gone
stays until HCCL's own time is over, and keeps the device's slot so long.
"""

from __future__ import annotations

import logging
import os
import random
import select
import socket
import threading
import time
from typing import Callable, Protocol, TypeVar

from llm_datadist._hccl_end import HcclPeer
from llm_datadist._hccl_exchange import Exchange
from llm_datadist.control.messages import (
    CommunicatorMade,
    CommunicatorOffer,
    CommunicatorWish,
    Message,
    MessageError,
)
from llm_datadist.control.stream import receive_message, send_message
from llm_datadist.transports.hccl.creation_slot import creation_slot
from llm_datadist.transports.hccl.hccl_device import THREAD_NAME, HcclDevice

_log = logging.getLogger("llm_datadist.link")

_LOOK_SECONDS = 0.02  # how often a wait looks at the link
_FIRST_PAUSE, _LONGEST_PAUSE = 0.002, 0.1  # after the other end was busy, in seconds

_Kind = TypeVar("_Kind", CommunicatorWish, CommunicatorOffer, CommunicatorMade)


class CommunicatorRefused(Exception):
    """The two devices cannot have a communicator; says why."""


Steps = tuple[Callable[[], None], ...]


class Way(Protocol):
    """How the communicators of a link are made.

    Deadlines are on the clock of ``time.monotonic``. `gives_up` tells a step that waits that there is no use for it any
    more: the link may be over, and the other end may have failed.
    """

    def wish(self) -> CommunicatorWish:
        """Say what the other end has to know."""

    def objection(self, wish: CommunicatorWish) -> str:
        """Say why there can be no communicator with the end that has the wish; empty if there can."""

    def offer(self, wish: CommunicatorWish) -> CommunicatorOffer:
        """Answer a wish; raises if there will be no communicator."""

    def joining(self, offer: CommunicatorOffer, deadline: float, gives_up: Callable[[], bool]) -> Steps:
        """Give the steps of the end that begins. A step raises if it fails, and may wait as long as HCCL does."""

    def giving(
        self, wish: CommunicatorWish, offer: CommunicatorOffer, deadline: float, gives_up: Callable[[], bool]
    ) -> Steps:
        """Give the steps of the end that was asked: as many, and each is carried out beside the other end's."""


class Maker:
    """Makes the communicators of one link.

    Parameters
    ----------
    hccl : HcclDevice
        Of this process.
    exchange : Exchange
        Of the link.
    way : Way
        How.
    end : HcclPeer
        Has the data connections.
    hold, let_go : callable
        Around the time that the exchange is used in a thread of the maker.
    """

    def __init__(
        self,
        hccl: HcclDevice,
        exchange: Exchange,
        way: Way,
        end: HcclPeer,
        hold: Callable[[], None],
        let_go: Callable[[], None],
    ) -> None:
        self._hccl = hccl
        self._exchange = exchange
        self._way = way
        self._end = end
        self._hold, self._let_go = hold, let_go
        self._changed = threading.Condition()
        self._running = False
        self._error: Exception | None = None

    def begin(self, on_end: Callable[[], None] | None = None) -> None:
        """See to it that a communicator is being made; does not wait."""
        with self._changed:
            if self._running or self._exchange.ready:
                if on_end is not None and not self._running:
                    on_end()
                return
            thread = threading.Thread(target=self._run, args=(on_end,), name=THREAD_NAME, daemon=True)
            self._running, self._error = True, None
            self._hold()
            try:
                thread.start()
            except RuntimeError:  # the process may have no more of them
                self._running = False
                self._let_go()
                raise

    def want(self, deadline_ns: int) -> bool:
        """Have a communicator made, and wait for it; tells whether there is one at the deadline.

        Raises
        ------
        Exception
            It cannot be made: `CommunicatorRefused`, or what HCCL, ACL or the connection to the peer says.
        """
        self.begin()
        with self._changed:
            while self._running and not self._end.is_over and time.monotonic_ns() < deadline_ns:
                self._changed.wait(_LOOK_SECONDS)
            if self._exchange.ready:
                return True
            if self._error is not None:
                raise self._error
            return False

    # ---- the end that begins

    def _run(self, on_end: Callable[[], None] | None) -> None:
        error: Exception | None = None
        try:
            self._make(time.monotonic() + self._hccl.connect_seconds)
        except Exception as failure:
            error = failure
            if not self._end.is_over:
                _log.warning("no communicator: %s", failure)
        finally:
            self._let_go()
            with self._changed:
                self._running, self._error = False, error
                self._changed.notify_all()
            if on_end is not None:
                on_end()

    def _make(self, deadline: float) -> None:
        slot = creation_slot(self._hccl.device.device_id)
        pause = _FIRST_PAUSE
        while not self._exchange.ready:
            _require_time(self._end, deadline, "the other end was busy all the time")
            if not slot.acquire(timeout=_LOOK_SECONDS):
                continue
            try:
                self._attempt(deadline)
            finally:
                slot.release()
            if not self._exchange.ready:
                time.sleep(pause * random.random())  # no deadline is near: the next look at the clock is the loop's
                pause = min(2 * pause, _LONGEST_PAUSE)

    def _attempt(self, deadline: float) -> None:
        """Ask once; nothing has changed if the other end is busy."""
        descriptor = self._end.take_channel(int(deadline * 1e9))
        if descriptor < 0:
            raise ConnectionError("there is no data connection to the peer")
        good = False
        try:
            good = self._ask(descriptor, deadline)
        finally:
            if good:
                self._end.keep_channel(descriptor)
            else:
                self._end.drop_channel(descriptor)

    def _ask(self, descriptor: int, deadline: float) -> bool:
        if not self._end.ask_for_communicator(descriptor, int(max(0.001, deadline - time.monotonic()) * 1e9)):
            raise ConnectionError("the peer closed the data connection")
        with _Talk(descriptor, deadline, self._is_over) as talk:
            talk.say(self._way.wish())
            offer = talk.hear(CommunicatorOffer)
            if offer.reason:
                raise CommunicatorRefused(offer.reason)
            if not offer.busy:
                self._join(talk, offer, deadline)
            return True

    def _join(self, talk: _Talk, offer: CommunicatorOffer, deadline: float) -> None:
        with _Change(self._exchange, deadline):
            self._carry_out(talk, self._way.joining(offer, deadline, self._gives_up(talk)))

    # ---- the end that is asked

    def answer(self, descriptor: int, timeout_ns: int) -> bool:
        """Take part in making a communicator that the peer wants; tells whether the connection is still good."""
        deadline = time.monotonic() + min(timeout_ns / 1e9, self._hccl.connect_seconds)
        with _Talk(descriptor, deadline, self._is_over) as talk:
            wish = talk.hear(CommunicatorWish)
            reason = self._way.objection(wish)
            slot = creation_slot(self._hccl.device.device_id)
            if reason or not slot.acquire(blocking=False):
                talk.say(CommunicatorOffer(not reason, reason[:1000], b"", "", 0, 0, False, "", 0, 0))
                return True
        return self._answer_in_thread(descriptor, wish, slot, deadline)

    def _answer_in_thread(self, descriptor: int, wish: CommunicatorWish, slot: threading.Lock, deadline: float) -> bool:
        ended: list[bool] = []

        def run() -> None:
            try:
                with talk:
                    self._give(talk, wish, deadline)
                ended.append(True)
            except Exception as error:
                if not self._end.is_over:
                    _log.warning("no communicator for the peer: %s", error)
                ended.append(False)
            finally:
                slot.release()
                self._let_go()

        talk = _Talk(descriptor, deadline, self._is_over)
        self._hold()
        thread = threading.Thread(target=run, name=THREAD_NAME, daemon=True)
        try:
            thread.start()
        except RuntimeError:
            slot.release()
            self._let_go()
            raise
        while thread.is_alive() and not self._end.is_over:
            thread.join(_LOOK_SECONDS)
        return ended == [True]

    def _give(self, talk: _Talk, wish: CommunicatorWish, deadline: float) -> None:
        with _Change(self._exchange, deadline):
            offer = self._way.offer(wish)
            talk.say(offer)
            self._carry_out(talk, self._way.giving(wish, offer, deadline, self._gives_up(talk)))

    # ---- both

    def _carry_out(self, talk: _Talk, steps: Steps) -> None:
        """Go on only as long as both ends succeed; the exchange is ready then."""
        for step in steps:
            try:
                step()
            except Exception as error:
                talk.say(CommunicatorMade(str(error)[:1000] or type(error).__name__))
                if talk.has_word:  # the other end has failed first
                    _require_success(talk.hear(CommunicatorMade))
                raise
            talk.say(CommunicatorMade(""))
            _require_success(talk.hear(CommunicatorMade))
        self._exchange.open()

    def _gives_up(self, talk: _Talk) -> Callable[[], bool]:
        return lambda: self._end.is_over or talk.has_word

    def _is_over(self) -> bool:
        return self._end.is_over


class _Change:
    """The time in which an exchange has no communicator, or one that is not ready."""

    def __init__(self, exchange: Exchange, deadline: float) -> None:
        self._exchange = exchange
        self._deadline = deadline

    def __enter__(self) -> None:
        if not self._exchange.begin_change(int(self._deadline * 1e9)):
            raise TimeoutError("a transfer over the communicator that was lost does not end")
        self._exchange.discard(int(self._deadline * 1e9))

    def __exit__(self, *exception: object) -> None:
        if not self._exchange.ready:
            self._exchange.discard(int(self._deadline * 1e9))
        self._exchange.end_change()


class _Talk:
    """Messages over a data connection that is otherwise read by native code."""

    def __init__(self, descriptor: int, deadline: float, is_over: Callable[[], bool]) -> None:
        self._connection = socket.socket(fileno=os.dup(descriptor))
        self._deadline = deadline
        self._is_over = is_over

    def __enter__(self) -> _Talk:
        return self

    def __exit__(self, *exception: object) -> None:
        self._connection.close()

    def say(self, message: Message) -> None:
        """Send a message; raises OSError."""
        send_message(self._connection, message)

    def hear(self, kind: type[_Kind]) -> _Kind:
        """Wait for a message; raises OSError, also at the deadline, and MessageError."""
        steps = receive_message(self._connection)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                if not isinstance(end.value, kind):
                    raise MessageError(f"unexpected message {end.value!r}") from None
                return end.value
            self._wait()

    @property
    def has_word(self) -> bool:
        """Whether the other end has said something, or has closed the connection."""
        poller = select.poll()
        poller.register(self._connection, select.POLLIN)
        return bool(poller.poll(0))

    def _wait(self) -> None:
        poller = select.poll()
        poller.register(self._connection, select.POLLIN)
        while not poller.poll(_LOOK_SECONDS * 1000):
            if self._is_over():
                raise ConnectionError("the link was taken down")
            if time.monotonic() >= self._deadline:
                raise TimeoutError("the peer has not answered in time")


def _require_time(end: HcclPeer, deadline: float, reason: str) -> None:
    if end.is_over:
        raise ConnectionError("the link was taken down")
    if time.monotonic() >= deadline:
        raise TimeoutError(reason)


def _require_success(made: CommunicatorMade) -> None:
    if made.reason:
        raise ConnectionError(f"the other end has failed: {made.reason}")
