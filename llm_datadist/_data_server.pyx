"""The owner's end of data channels: gives and takes the bytes of registered memory, without the interpreter lock.

A server sees the directory of its own process as a peer would, and claims what it touches in the same way: memory is
not given back to the program while a request for it is carried out. Nothing that a request says is believed: the entry
must be published under the generation that it names, and every range must lie inside one tensor of it.
"""

from libc.stdint cimport uint64_t
from libc.stdlib cimport free, malloc

from llm_datadist._atomics cimport load_relaxed, monotonic_ns
from llm_datadist._channel cimport MAX_RANGES, READ_RANGES, WRITE_RANGES, Reply, Request, channel_magic
from llm_datadist._copy cimport Gate
from llm_datadist._core cimport HIDDEN, SCATTERED, DirectoryEntry, Found, PeerMemory
from llm_datadist._outcome cimport BAD_DIRECTORY, DONE, KEY_UNKNOWN, MEMORY_FAULT, TARGET_ADDRESS, Outcome
from llm_datadist._stream cimport (
    STREAM_FAULT, STREAM_OK, Range, StreamEnd, receive_bytes, receive_ranges, send_bytes, send_ranges,
)

cdef enum:
    CLAIM_NS = 1000000000     # for a free hazard word; there are more of them than channels usually have requests


cdef class DataServer(PeerMemory):
    """Serves channels from the memory of this process; the segments are those of its own directory."""

    def serve(self, int fd):
        """Carry out the requests of one channel until it is closed by its other end, or broken.

        Parameters
        ----------
        fd : int
            Stream socket; stays the caller's. Shutting it down ends the call.
        """
        cdef Range *ranges = <Range *>malloc(MAX_RANGES * sizeof(Range))
        if ranges == NULL:
            raise MemoryError()
        with nogil:
            while self._serve_one(fd, ranges):
                pass
            free(ranges)

    cdef bint _serve_one(self, int fd, Range *ranges) noexcept nogil:
        """Carry one request out; False when the channel is at its end."""
        cdef Request request
        cdef Found found
        cdef Outcome outcome
        cdef bint goes_on
        if receive_bytes(fd, &request, sizeof(Request), NULL) != STREAM_OK:
            return False
        if request.magic != channel_magic() or request.count == 0 or request.count > MAX_RANGES:
            return False
        if receive_bytes(fd, ranges, request.count * sizeof(Range), NULL) != STREAM_OK:
            return False
        outcome = self._claim_entry(&request, &found)
        if outcome != DONE:
            return _send_reply(fd, outcome)
        outcome = self._check_ranges(&request, &found.entry, ranges)
        goes_on = _send_reply(fd, outcome)
        if outcome == DONE and goes_on:
            goes_on = self._move(fd, &request, ranges)
        self._drop_hazard(found.hazard)
        return goes_on

    cdef bint _move(self, int fd, const Request *request, const Range *ranges) noexcept nogil:
        cdef StreamEnd end
        if request.operation == READ_RANGES:
            return send_ranges(fd, ranges, request.count, NULL) == STREAM_OK
        end = receive_ranges(fd, ranges, request.count, NULL)
        if end == STREAM_FAULT:
            _send_reply(fd, MEMORY_FAULT)
        return end == STREAM_OK and _send_reply(fd, DONE)

    cdef Outcome _claim_entry(self, const Request *request, Found *found) noexcept nogil:
        cdef Gate gate = self._gate(monotonic_ns() + CLAIM_NS)
        if request.operation != READ_RANGES and request.operation != WRITE_RANGES:
            return BAD_DIRECTORY
        if request.index >= self._num_entries:
            return KEY_UNKNOWN
        found.index = request.index
        if not self._read_entry(found.index, &found.entry) or found.entry.generation != request.generation:
            return KEY_UNKNOWN
        if found.entry.flags & HIDDEN:
            return KEY_UNKNOWN
        return self._claim_found(found, &gate)

    cdef Outcome _check_ranges(
        self, const Request *request, const DirectoryEntry *entry, const Range *ranges
    ) noexcept nogil:
        """Check that every range lies inside one tensor."""
        cdef uint64_t tensor = 0
        cdef uint64_t total = 0
        cdef uint64_t i, tried, within
        for i in range(request.count):
            for tried in range(entry.tensors + 1):
                if tried == entry.tensors:
                    return TARGET_ADDRESS
                # Mostly the same tensor as that of the range before, or the next one.
                within = ranges[i].address - self._owner_address(entry, tensor)
                if within < entry.tensor_nbytes and ranges[i].nbytes <= entry.tensor_nbytes - within:
                    break
                tensor = tensor + 1 if tensor + 1 < entry.tensors else 0
            total += ranges[i].nbytes
        return DONE if total == request.nbytes else TARGET_ADDRESS

    cdef uint64_t _owner_address(self, const DirectoryEntry *entry, uint64_t tensor) noexcept nogil:
        """Address of a tensor in this process, as its directory gives it to peers."""
        if entry.flags & SCATTERED:
            return load_relaxed(&self._tables[entry.base // sizeof(uint64_t) + tensor])
        return self._header.pool_address + entry.base + tensor * entry.step


cdef bint _send_reply(int fd, Outcome outcome) noexcept nogil:
    cdef Reply reply
    reply.magic = channel_magic()
    reply.outcome = <uint64_t>outcome
    return send_bytes(fd, &reply, sizeof(Reply), NULL, False) == STREAM_OK
