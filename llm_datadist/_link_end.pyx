"""The life of one end of a link, however its bytes move: transfers that run, channels, and what ends them."""

import os

from libc.stdint cimport uint64_t

from llm_datadist._atomics cimport compare_exchange, exchange, fetch_add, fetch_sub, load_acquire, monotonic_ns
from llm_datadist._copy cimport Gate, stopped
from llm_datadist._outcome cimport DONE, LINK_CLOSED, PEER_DEAD, REVOKED, Outcome

cdef extern from "unistd.h" nogil:
    int close(int descriptor)
    int usleep(unsigned microseconds)


cdef class LinkEnd:
    """What every end of a link has.

    A subclass that holds more than channels gives it up in `_release`.
    """

    def __cinit__(self):
        self._threads = 1
        self._patience_ns = 100000000  # for the first channel of a new link, or one in place of one that broke

    def __dealloc__(self):
        self._close_channels()

    def use_threads(self, uint64_t threads):
        """Let one copy use so many threads, the caller's included."""
        self._threads = threads

    # ---- life

    def mark_dead(self):
        """The peer died or closed the link: running and later transfers fail at once."""
        exchange(&self._peer_dead, 1)

    @property
    def dead(self) -> bool:
        return load_acquire(&self._peer_dead) != 0

    @property
    def is_over(self) -> bool:
        """Whether transfers fail from now on: the peer is dead, or the end is closed or being closed."""
        return load_acquire(&self._peer_dead) != 0 or load_acquire(&self._closing) != 0

    @property
    def busy(self) -> bool:
        """Whether a transfer is running."""
        return load_acquire(&self._running) != 0

    def begin_close(self):
        """Let new transfers wait; False, and nothing changed, if one is running.

        `close` or `reopen` decides what becomes of those that wait.
        """
        exchange(&self._undecided, 1)
        if load_acquire(&self._running) != 0:
            exchange(&self._undecided, 0)
            return False
        return True

    def reopen(self):
        """Take `begin_close` back."""
        exchange(&self._undecided, 0)

    def close(self, uint64_t deadline_ns):
        """End running transfers with `LINK_CLOSED` and give everything up; tells whether it was done by the deadline.

        The object may be closed again later; what it holds also goes with its last reference.
        """
        cdef bint idle
        exchange(&self._closing, 1)
        exchange(&self._undecided, 0)
        with nogil:
            while True:
                idle = load_acquire(&self._running) == 0
                if idle or monotonic_ns() > deadline_ns:
                    break
                usleep(20)
        if idle:
            self._close_channels()
            self._release()
        return idle

    def _release(self):
        """Give up what the end holds; no transfer runs."""

    # ---- channels: streams to the data server of the peer

    @property
    def channels(self) -> int:
        """Data channels that transfers can use."""
        return load_acquire(&self._num_channels)

    @property
    def has_free_channel(self) -> bool:
        """Whether a transfer that starts now finds a channel that no other uses."""
        cdef int i
        for i in range(MAX_CHANNELS):
            if load_acquire(&self._channels[i]) != 0:
                return True
        return False

    def add_channel(self, int descriptor):
        """Take over a stream socket whose other end the data server of the peer serves.

        Raises
        ------
        ValueError
            There are eight already, or the end is closed; the caller keeps the socket.
        """
        if load_acquire(&self._closing) != 0:
            raise ValueError("the link is closed")
        if fetch_add(&self._num_channels, 1) >= MAX_CHANNELS:
            fetch_sub(&self._num_channels, 1)
            raise ValueError(f"{MAX_CHANNELS} data channels exist, no more are used")
        self._keep_channel(descriptor)

    cdef int _close_channels(self) except -1:
        cdef uint64_t taken
        cdef int i
        for i in range(MAX_CHANNELS):
            taken = exchange(&self._channels[i], 0)
            if taken != 0:
                fetch_sub(&self._num_channels, 1)
                os.close(taken - 1)
        return 0

    cdef int _take_channel(self, const Gate *gate) noexcept nogil:
        """Take a free channel, waiting for one that is in use or about to be opened; -1 if there is none.

        A caller alone always gets the same one, so that the peer carries its requests out in order.
        """
        cdef uint64_t start = monotonic_ns()
        cdef uint64_t taken, now
        cdef int i
        while True:
            for i in range(MAX_CHANNELS):
                taken = exchange(&self._channels[i], 0) if load_acquire(&self._channels[i]) != 0 else 0
                if taken != 0:
                    return <int>(taken - 1)
            now = monotonic_ns()
            if stopped(gate) or now > gate.deadline_ns:
                return -1
            if now - start > self._patience_ns and load_acquire(&self._num_channels) == 0:
                return -1
            usleep(20)

    cdef void _keep_channel(self, int descriptor) noexcept nogil:
        cdef int i
        for i in range(MAX_CHANNELS):
            if compare_exchange(&self._channels[i], 0, <uint64_t>descriptor + 1):
                return

    cdef void _drop_channel(self, int descriptor) noexcept nogil:
        """Close a channel that was taken: its stream stands in the middle of something, or its other end is gone."""
        close(descriptor)
        fetch_sub(&self._num_channels, 1)

    # ---- transfers

    cdef Outcome _enter(self, uint64_t deadline_ns) noexcept nogil:
        """Begin a transfer: with DONE, `_leave` must follow, and the end of the link waits for it."""
        while True:
            fetch_add(&self._running, 1)
            if load_acquire(&self._closing) == 0 and load_acquire(&self._undecided) == 0:
                return DONE
            fetch_sub(&self._running, 1)
            if load_acquire(&self._closing) != 0 or monotonic_ns() > deadline_ns:
                return LINK_CLOSED
            usleep(20)

    cdef void _leave(self) noexcept nogil:
        fetch_sub(&self._running, 1)

    cdef Gate _gate(self, uint64_t deadline_ns) noexcept nogil:
        cdef Gate gate
        gate.deadline_ns = deadline_ns
        gate.peer_dead = &self._peer_dead
        gate.revoked = NULL
        gate.closing = &self._closing
        return gate

    cdef Outcome _why_stopped(self) noexcept nogil:
        if load_acquire(&self._closing) != 0:
            return LINK_CLOSED
        if load_acquire(&self._peer_dead) != 0:
            return PEER_DEAD
        return REVOKED
