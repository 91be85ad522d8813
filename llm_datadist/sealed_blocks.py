"""Blocks that a pull takes only while they are the ones that were meant.

The owner of a blocks cache publishes blocks and gets a token, which travels to the puller with the request, through any
router: it is ``bytes``, so pickle and msgpack carry it. A pull that presents it ends in LLM_KV_CACHE_NOT_EXIST if a
block was retired or published anew before the bytes had arrived, and never in the bytes of another request. A pull
without a token is not checked.

This is an addition to the documented interface.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from llm_datadist.arguments import check_isinstance, check_list_uint64
from llm_datadist.cache import Cache
from llm_datadist.cache_handle import CacheHandle
from llm_datadist.cache_kinds import check_blocks_cache, check_device_cache
from llm_datadist.engine_access import EngineAccess
from llm_datadist.kv_cache import KvCache
from llm_datadist.status import InvalidArgument

BlocksToken = bytes  # about 40 of them; what they mean is known to this library alone


class SealedBlocks(EngineAccess):
    """Base of both managers: what the owner of blocks does."""

    def publish_blocks(
        self, cache: KvCache | Cache, blocks: Sequence[int], lease_s: float | None = None
    ) -> BlocksToken:
        """Seal blocks, whose bytes are complete, and give the token that a pull of them may present.

        A block that is published already is published anew: pulls with its earlier token fail from now on.

        Parameters
        ----------
        cache : KvCache or Cache
            A blocks cache of this process.
        blocks : list or tuple of int
            Block numbers, uint64, at least one.
        lease_s : float, optional
            Seconds until the token ends by itself, > 0: for pullers that vanish without a word. The blocks may be used
            again when `retire_expired` has named them. None: the token lives until `retire_blocks`.

        Returns
        -------
        bytes
            The token.

        Raises
        ------
        TypeError
            An argument of the wrong type.
        ValueError
            A block number is no uint64.
        LLMException
            LLM_PARAM_INVALID: no blocks, a block or a lease that cannot be, or no blocks cache.
            LLM_KV_CACHE_NOT_EXIST: the cache is deallocated.

        Examples
        --------
        ::

            token = manager.publish_blocks(cache, [4, 7], lease_s=30.0)
            send(request_id, blocks=[4, 7], token=token)  # in msgpack, JSON needs base64 or hex
            # the puller: manager.pull_blocks(key, cache, blocks, mine, token=token)
            # the request is aborted:
            manager.retire_blocks(token)
        """
        _check_handle(cache)
        check_isinstance("blocks", blocks, [list, tuple], int, allow_none=False)
        check_isinstance("lease_s", lease_s, [float, int])
        _check_kind(cache)
        if not blocks:
            raise InvalidArgument("blocks can not be empty")
        if lease_s is not None and not (math.isfinite(lease_s) and lease_s > 0):
            raise InvalidArgument(f"lease_s {lease_s} is invalid, should be greater than 0, or None for no end")
        check_list_uint64("blocks", blocks)
        return self._engine.publish_blocks(
            self._engine_id(cache), list(blocks), None if lease_s is None else float(lease_s)
        )

    def retire_blocks(self, token: BlocksToken) -> None:
        """End a token: pulls that present it fail from now on, and so do those that run; the blocks may be used again.

        Parameters
        ----------
        token : bytes
            What `publish_blocks` gave; ended already is no error.

        Raises
        ------
        TypeError
            `token` is no bytes.
        LLMException
            LLM_PARAM_INVALID: `token` is no token.
        """
        check_isinstance("token", token, bytes, allow_none=False)
        self._engine.retire_blocks(token)

    def retire_expired(self, cache: KvCache | Cache) -> list[int]:
        """Retire the blocks of a cache whose lease has run out, and list them: they may be used again.

        Parameters
        ----------
        cache : KvCache or Cache
            A blocks cache of this process.

        Raises
        ------
        TypeError
            `cache` is no cache.
        LLMException
            LLM_PARAM_INVALID: no blocks cache. LLM_KV_CACHE_NOT_EXIST: the cache is deallocated.
        """
        _check_handle(cache)
        _check_kind(cache)
        return self._engine.retire_expired(self._engine_id(cache))


def _check_handle(cache: object) -> None:
    """Check for a handle of a cache."""
    check_isinstance("cache", cache, [KvCache, Cache], allow_none=False)


def check_token(token: object) -> None:
    """Check what a pull presents as token: None or bytes."""
    check_isinstance("token", token, bytes)


def _check_kind(cache: CacheHandle) -> None:
    """Check that the slots of a cache may be blocks; a `KvCache` does not know."""
    if isinstance(cache, Cache):
        check_blocks_cache("cache", cache)
    else:
        check_device_cache("cache", cache)
