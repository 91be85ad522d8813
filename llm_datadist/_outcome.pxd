# How transfers end, for all native modules.

cpdef enum Outcome:
    """How a one-sided transfer ended; `TransferFault.outcome` holds every one but `DONE`."""
    DONE = 0
    KEY_UNKNOWN = 1
    SLOT_UNKNOWN = 2
    SOURCE_RANGE = 3          # offset + size beyond the remote slot
    SOURCE_TENSORS = 4        # remote tensor indices do not exist
    TENSOR_COUNT = 5          # numbers of tensors differ
    BLOCK_SIZE = 6            # strides differ
    SOURCE_BLOCK = 7          # remote block index does not exist
    CACHE_RELEASED = 8        # the local cache was deallocated
    TIMED_OUT = 9
    PEER_DEAD = 10
    REVOKED = 11              # the peer took the link down while the bytes moved
    LINK_CLOSED = 12
    BAD_DIRECTORY = 13        # the peer's directory points outside of its pool
    NO_MEMORY = 14
    TARGET_ADDRESS = 15       # an address lies in no cache of the peer, or the bytes would run over its end
    STALE_BLOCKS = 16         # a block is not, or no longer, what the token was given out for
    MEMORY_FAULT = 17         # registered memory is not mapped, here or at the peer
    MEMORY_DENIED = 18        # private memory of the peer can only be reached through its data server
    TARGET_READ_ONLY = 19     # the peer's pool is not shared for writing
    TARGET_TENSORS = 20       # tensor indices of a push do not exist at the peer
    TARGET_BLOCK = 21         # nor does a block or slot
    TARGET_RANGE = 22         # a slot is larger than the one that it is pushed into
    CORRUPTED = 23            # the checksum over the bytes says that they changed on the way
    DEVICE_FAILED = 24        # the device or its communication library reports an error
    NO_COMMUNICATOR = 25      # the owner has lost the communicator of the link
