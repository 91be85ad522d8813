"""The mode of an instance, and which calls it offers."""

from __future__ import annotations

from typing import NamedTuple, Optional

from llm_datadist.status import InvalidArgument, LLMException, LLMStatusCode

CACHE_MANAGER = "llm.EnableCacheManager"
REMOTE_ACCESS = "llm.EnableRemoteCacheAccessible"
LOCAL_COMM_RES = "llm.LocalCommRes"
TRANSFER_BACKEND = "llm.TransferBackend"

Listen = Optional[tuple[str, int]]


class ModeRules(NamedTuple):
    """What an instance may be asked for.

    Attributes
    ----------
    cache_manager : bool
        Whether it is in cache-manager mode; else it is in KV mode.
    has_backend : bool
        Whether a transfer backend was asked for.
    needs_local_address : bool
        Whether clusters to link to need a local address.
    listen : (str, int) or None
        Address that was given to listen at, in cache-manager mode.
    """

    cache_manager: bool = False
    has_backend: bool = False
    needs_local_address: bool = False
    listen: Listen = None

    def require_kv_mode(self, function: str) -> None:
        """Check that a call of the KV mode is possible."""
        if self.cache_manager:
            raise InvalidArgument(f"[{function}] is not supported when {CACHE_MANAGER} is configured")

    def require_cache_manager_mode(self, function: str) -> None:
        """Check that a call of the cache-manager mode is possible."""
        if not self.cache_manager:
            raise InvalidArgument(f"[{function}] is not supported when {CACHE_MANAGER} is not configured")

    def require_communicators(self, function: str) -> None:
        """Check that a call about communicators is possible."""
        self.require_cache_manager_mode(function)
        if self.has_backend:
            raise LLMException(
                f"[{function}] is not supported when {TRANSFER_BACKEND} is configured: use link_clusters",
                status_code=LLMStatusCode.LLM_FEATURE_NOT_ENABLED,
            )

    def listen_after_switch(self, wanted: Listen) -> Listen:
        """Tell where an instance in cache-manager mode listens after a switch of its role: a backend goes on to."""
        return self.listen if wanted is None and self.has_backend else wanted
