"""Names under which a remote cluster finds a cache.

A key also knows its name inside the engine, and whether a pull can use it, so that a pull does not have to work it out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from llm_datadist.arguments import UINT64_MAX, check_int64, check_isinstance, check_uint32, check_uint64
from llm_datadist.engine.keys import KeyKind, KeyName
from llm_datadist.status import InvalidArgument

INVALID_ID = UINT64_MAX

_ORDINARY = int(KeyKind.ORDINARY)
_PREFIX = int(KeyKind.PREFIX)
_BLOCKS = int(KeyKind.BLOCKS)
_CACHE = int(KeyKind.CACHE)


def is_valid_id(number: int) -> bool:
    """Tell whether an id of a request, prefix or cluster names something; ``2**64 - 1`` does not."""
    return number != INVALID_ID


def is_invalid_id(number: int) -> bool:
    """Tell whether an id is ``2**64 - 1``, which stands for none."""
    return number == INVALID_ID


class CacheKey:
    """Name of one slot of a cache: of a request, or of a prefix that requests share.

    ``CacheKey(cluster_id, req_id, model_id=0, prefix_id=INVALID_ID)``; the first argument may also be given as
    ``prompt_cluster_id``.

    Parameters
    ----------
    cluster_id : int
        Cluster that owns the cache, uint64; chooses the link of a pull and has no part in the name.
    req_id : int
        Request, uint64; ``2**64 - 1`` says that the slot has no request.
    model_id : int
        Tells the models of one process apart, uint64.
    prefix_id : int
        Common prefix, uint64; if it is not ``2**64 - 1``, this is the key of a prefix.

    Raises
    ------
    TypeError
        An argument is no int.
    ValueError
        An argument is out of range.
    LLMException
        LLM_PARAM_INVALID: too many arguments, an unknown name, or no cluster id or request id.

    Examples
    --------
    >>> from llm_datadist import CacheKey
    >>> CacheKey(1, 42)
    CacheKey(cluster_id=1, req_id=42, prefix_id=18446744073709551615, model_id=0)
    >>> CacheKey(prompt_cluster_id=1, req_id=2**64 - 1, prefix_id=7).prefix_id
    7
    """

    __slots__ = ("_cluster_id", "_is_placeholder", "_model_id", "_name", "_prefix_id", "_pullable", "_req_id")

    def __init__(self, *args: int, **kwargs: int) -> None:
        given = _collect("CacheKey", ("cluster_id", "req_id", "model_id", "prefix_id"), args, kwargs)
        if "req_id" not in given:
            raise InvalidArgument("req_id is required for a CacheKey")
        _refuse_unknown("CacheKey", kwargs, ("cluster_id", "prompt_cluster_id", "req_id", "model_id", "prefix_id"))
        self._cluster_id = check_uint64("cluster_id", given["cluster_id"])
        self._req_id = check_uint64("req_id", given["req_id"])
        self._model_id = check_uint64("model_id", given.get("model_id", 0))
        self._prefix_id = check_uint64("prefix_id", given.get("prefix_id", INVALID_ID))
        has_request, has_prefix = is_valid_id(self._req_id), is_valid_id(self._prefix_id)
        self._is_placeholder = not has_request and not has_prefix
        self._pullable = has_request != has_prefix
        self._name: KeyName = (
            (_PREFIX, self._prefix_id, self._model_id) if has_prefix else (_ORDINARY, self._req_id, self._model_id)
        )

    @property
    def prompt_cluster_id(self) -> int:
        """Cluster that owns the cache."""
        return self._cluster_id

    @property
    def cluster_id(self) -> int:
        """Cluster that owns the cache."""
        return self._cluster_id

    @property
    def req_id(self) -> int:
        """Request."""
        return self._req_id

    @property
    def model_id(self) -> int:
        """Model."""
        return self._model_id

    @property
    def prefix_id(self) -> int:
        """Common prefix, or ``2**64 - 1``."""
        return self._prefix_id

    def __repr__(self) -> str:
        return (
            f"CacheKey(cluster_id={self._cluster_id}, req_id={self._req_id}, "
            f"prefix_id={self._prefix_id}, model_id={self._model_id})"
        )


class CacheKeyByIdAndIndex:
    """Name of one slot of a remote cache by the id that its owner knows it by.

    Parameters
    ----------
    cluster_id : int
        Cluster that owns the cache, uint64.
    cache_id : int
        ``KvCache.cache_id`` there, int64.
    batch_index : int
        Slot, uint32; for a blocks cache the block.

    Raises
    ------
    TypeError
        An argument is no int.
    ValueError
        An argument is out of range.

    Examples
    --------
    >>> from llm_datadist import CacheKeyByIdAndIndex
    >>> CacheKeyByIdAndIndex(cluster_id=1, cache_id=3, batch_index=2)
    CacheKeyByIdAndIndex(cluster_id=1, cache_id=3, batch_index=2)
    """

    __slots__ = ("_batch_index", "_cache_id", "_cluster_id", "_name")

    _pullable = True

    def __init__(self, cluster_id: int, cache_id: int, batch_index: int = 0) -> None:
        self._cluster_id = check_uint64("cluster_id", cluster_id)
        self._cache_id = check_int64("cache_id", cache_id)
        self._batch_index = check_uint32("batch_index", batch_index)
        # Ids of caches start at 1. A negative one is found nowhere, and neither is INVALID_ID.
        self._name: KeyName = (_CACHE, cache_id if cache_id >= 0 else INVALID_ID, batch_index)

    @property
    def cluster_id(self) -> int:
        """Cluster that owns the cache."""
        return self._cluster_id

    @property
    def cache_id(self) -> int:
        """Id of the cache on its owner."""
        return self._cache_id

    @property
    def batch_index(self) -> int:
        """Slot, or block of a blocks cache."""
        return self._batch_index

    def __repr__(self) -> str:
        return (
            f"CacheKeyByIdAndIndex(cluster_id={self._cluster_id}, cache_id={self._cache_id}, "
            f"batch_index={self._batch_index})"
        )


class BlocksCacheKey:
    """Name of the blocks cache of a model.

    ``BlocksCacheKey(cluster_id, model_id=0)``; the first argument may also be given as ``prompt_cluster_id``.

    Parameters
    ----------
    cluster_id : int
        Cluster that owns the cache.
    model_id : int
        Model; one blocks cache each may be registered in a process.

    Raises
    ------
    TypeError
        An argument is no int. An int that is no uint64 is refused where the key is used.
    LLMException
        LLM_PARAM_INVALID: too many arguments, an unknown name, or no cluster id.

    Examples
    --------
    >>> from llm_datadist import BlocksCacheKey
    >>> BlocksCacheKey(1)
    BlocksCacheKey(cluster_id=1, model_id=0)
    >>> BlocksCacheKey(prompt_cluster_id=1, model_id=5).model_id
    5
    """

    __slots__ = ("_cluster_id", "_label", "_model_id", "_name", "_usable")

    def __init__(self, *args: int, **kwargs: int) -> None:
        given = _collect("BlocksCacheKey", ("cluster_id", "model_id"), args, kwargs)
        _refuse_unknown("BlocksCacheKey", kwargs, ("cluster_id", "prompt_cluster_id", "model_id"))
        cluster_id, model_id = given["cluster_id"], given.get("model_id", 0)
        check_isinstance("cluster_id", cluster_id, int, extra_fmt="The first param ", allow_none=False)
        check_isinstance("model_id", model_id, int, extra_fmt="The second param ", allow_none=False)
        self._cluster_id = cluster_id
        self._model_id = model_id
        self._label = "cluster_id" if args or "cluster_id" in kwargs else "prompt_cluster_id"
        self._name: KeyName = (_BLOCKS, 0, model_id)
        self._usable = 0 <= cluster_id <= UINT64_MAX and 0 <= model_id <= UINT64_MAX

    @property
    def prompt_cluster_id(self) -> int:
        """Cluster that owns the cache."""
        return self._cluster_id

    @property
    def cluster_id(self) -> int:
        """Cluster that owns the cache."""
        return self._cluster_id

    @property
    def model_id(self) -> int:
        """Model."""
        return self._model_id

    def __repr__(self) -> str:
        return f"BlocksCacheKey({self._label}={self._cluster_id}, model_id={self._model_id})"


def check_blocks_cache_key(key: BlocksCacheKey) -> None:
    """Check that the numbers of a blocks key are uint64; raises ValueError."""
    check_uint64("cluster_id", key.cluster_id)
    check_uint64("model_id", key.model_id)


def _collect(what: str, names: tuple[str, ...], args: Sequence[int], kwargs: Mapping[str, int]) -> dict[str, int]:
    """Put arguments by place and by name together, those by place win; the cluster id must be there."""
    if len(args) + len(kwargs) > len(names):
        raise InvalidArgument(
            f"Param num is over limit: {len(args) + len(kwargs)} arguments for a {what}, at most {len(names)}"
        )
    given = dict(kwargs)
    if "prompt_cluster_id" in given:
        given.setdefault("cluster_id", given["prompt_cluster_id"])
    given.update(zip(names, args))
    if "cluster_id" not in given:
        raise InvalidArgument(f"cluster_id is required for a {what}")
    return given


def _refuse_unknown(what: str, kwargs: Mapping[str, int], known: tuple[str, ...]) -> None:
    for name in kwargs:
        if name not in known:
            raise InvalidArgument(f"Unsupported param: {name}, a {what} takes {', '.join(known)}")
