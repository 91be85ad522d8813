"""A layer-wise transfer as the program that started it sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_datadist.arguments import check_uint32
from llm_datadist.status import LLMStatusCode

if TYPE_CHECKING:
    from llm_datadist.engine.transfer_job import TransferJob


class CacheTask:
    """Handle of a transfer in the background; made by ``transfer_cache_async``.

    Both methods may be called again and again, from several threads. The transfer goes on if nobody holds the handle.

    Parameters
    ----------
    transfer_async_task : TransferJob
        The transfer.
    """

    def __init__(self, transfer_async_task: TransferJob) -> None:
        self._task = transfer_async_task

    def synchronize(self, timeout_in_millis: int | None = None) -> LLMStatusCode:
        """Wait for the end of the transfer and tell how it went as a whole.

        Parameters
        ----------
        timeout_in_millis : int, optional
            How long to wait, uint32; 0 only looks, None waits without limit.

        Returns
        -------
        LLMStatusCode
            LLM_WAIT_PROCESS_TIMEOUT, of a `CacheManager` LLM_TIMEOUT: still running, and it goes on. Else the first
            result, in the order of the configs, that is a failure; LLM_SUCCESS if there is none.

        Raises
        ------
        TypeError
            The timeout is no int.
        ValueError
            The timeout is no uint32.
        """
        return self._task.get(_seconds(timeout_in_millis))

    def get_results(self, timeout_in_millis: int | None = None) -> list[LLMStatusCode | None]:
        """Wait for the end of the transfer and tell how it went for each config.

        Parameters
        ----------
        timeout_in_millis : int, optional
            How long to wait, uint32; 0 only looks, None waits without limit.

        Returns
        -------
        list of LLMStatusCode or None
            One entry a config, in order. None: the transfer ended before it came to a result for this config. Still
            running: LLM_WAIT_PROCESS_TIMEOUT, of a `CacheManager` LLM_TIMEOUT, for every config, also for those that
            have all their layers.

        Raises
        ------
        TypeError
            The timeout is no int.
        ValueError
            The timeout is no uint32.
        """
        return self._task.get_results(_seconds(timeout_in_millis))


def _seconds(timeout_in_millis: int | None) -> float | None:
    if timeout_in_millis is None:
        return None
    return check_uint32("timeout_in_millis", timeout_in_millis) / 1000
