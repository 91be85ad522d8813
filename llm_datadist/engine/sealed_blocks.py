"""Sealed blocks of this process: which token stands for which blocks, and when its lease ends.

A seal is a word in shared memory beside the directory: the generation that a block was published under. A pull with a
token fails unless every block has the generation of the token before and after the copy, so it never delivers what
was written into a block after its seal was broken.
"""

from __future__ import annotations

import time
from typing import NamedTuple

from llm_datadist._directory import Directory, cache_of_token
from llm_datadist.engine.failures import invalid


class _Lot(NamedTuple):
    """Blocks that were published together."""

    entry: int  # of the cache's id in the directory
    blocks: list[int]
    expires_ns: int  # 0 = never


class SealedBlocks:
    """The tokens of one engine. It has no lock: the table of caches serialises the calls.

    Parameters
    ----------
    directory : Directory
        Holds the seals.
    """

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._lots: dict[int, dict[bytes, _Lot]] = {}  # of each cache, by token

    def seal(self, cache_id: int, entry: int, blocks: list[int], lease_s: float | None) -> bytes:
        """Publish blocks of a cache under a new token; tokens that they had before are stale for them.

        Parameters
        ----------
        cache_id, entry : int
            The cache, and its entry in the directory.
        blocks : list of int
            Blocks of it.
        lease_s : float or None
            Seconds after which the token is stale by itself; None = never.

        Raises
        ------
        LLMException
            LLM_PARAM_INVALID: a block does not exist.
        DirectoryFull
            No room for the seals.
        """
        expires_ns = 0 if lease_s is None else time.monotonic_ns() + int(lease_s * 1e9)
        try:
            token = self._directory.seal(entry, blocks, expires_ns)
        except ValueError as error:
            raise invalid("publish_blocks", str(error)) from None
        self._lots.setdefault(cache_id, {})[token] = _Lot(entry, list(blocks), expires_ns)
        return token

    def retire(self, token: bytes) -> None:
        """Break the seals of a token; one that was retired before, or whose cache is gone, is ignored.

        Raises
        ------
        LLMException
            LLM_PARAM_INVALID: these bytes are no token.
        """
        try:
            cache_id = cache_of_token(token)
        except ValueError as error:
            raise invalid("retire_blocks", str(error)) from None
        self._break(cache_id, token)

    def retire_expired(self, cache_id: int) -> list[int]:
        """Break the seals of a cache whose lease has run out; gives the blocks that had them, in order."""
        now = time.monotonic_ns()
        lots = self._lots.get(cache_id, {})
        expired = [token for token, lot in lots.items() if 0 < lot.expires_ns <= now]
        return sorted({block for token in expired for block in self._break(cache_id, token)})

    def forget(self, cache_id: int) -> None:
        """Forget the tokens of a cache that goes; its entry in the directory, and so its seals, go with it."""
        self._lots.pop(cache_id, None)

    def _break(self, cache_id: int, token: bytes) -> list[int]:
        lot = self._lots.get(cache_id, {}).pop(token, None)
        return [] if lot is None else self._directory.break_seals(lot.entry, lot.blocks, token)
