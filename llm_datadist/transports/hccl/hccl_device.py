"""What all links over HCCL of one device share: settings, registered memory, a thread that takes communicators down."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from dataclasses import dataclass

from llm_datadist import _acl, _hccl
from llm_datadist._acl import Device
from llm_datadist._hccl_exchange import Exchange
from llm_datadist._hccl_gets import OneSidedExchange
from llm_datadist._hccl_regions import RegisteredMemory
from llm_datadist._segment import Memory
from llm_datadist._shared_library import VendorError
from llm_datadist.devices.ascend.rank_table import LocalPart

_log = logging.getLogger("llm_datadist.link")

BUFFER_VARIABLE = "LLM_DATADIST_HCCL_BUFFER_MIB"
_DEFAULT_BUFFER_MIB = 4
_MOST_BUFFER_MIB = 4096
CONNECT_TIMEOUT_VARIABLE = "HCCL_CONNECT_TIMEOUT"
_CONNECT_SECONDS = 120.0  # HCCL's own default
THREAD_NAME = "llm_datadist-hccl"


@dataclass(frozen=True)
class HcclSettings:
    """How communicators are made.

    Attributes
    ----------
    buffer_mib : int
        Staging memory that HCCL takes from the device for each direction of a communicator, in MiB.
    execution_limit_s : int
        After how many seconds an operation whose partner does not come ends by itself, where HCCL can be told so.
    """

    buffer_mib: int = _DEFAULT_BUFFER_MIB
    execution_limit_s: int = 60


def hccl_settings(sync_kv_timeout_ms: int) -> HcclSettings:
    """Read the settings; an operation may wait a little longer than a transfer, whose deadline comes first.

    Raises
    ------
    ValueError
        The environment variable has no possible value.
    """
    text = os.environ.get(BUFFER_VARIABLE) or str(_DEFAULT_BUFFER_MIB)
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:9]) <= _MOST_BUFFER_MIB:
        raise ValueError(f"{BUFFER_VARIABLE} is {text!r}, should be a number of MiB in [1, {_MOST_BUFFER_MIB}]")
    return HcclSettings(int(text), max(60, -(-sync_kv_timeout_ms // 1000) + 30))


class HcclDevice:
    """A device as links over HCCL see it.

    Parameters
    ----------
    device : Device
        Of this process.
    pool : Memory
        Of the caches on it.
    settings : HcclSettings
        For the communicators that this process offers.
    place : LocalPart or None
        Where the device is; for one-sided links.

    Attributes
    ----------
    batched : bool
        Whether HCCL takes several operations in one call.
    version : str
        Of the installed runtime; empty if it does not say.
    """

    def __init__(self, device: Device, pool: Memory, settings: HcclSettings, place: LocalPart | None = None) -> None:
        self.device = device
        self.settings = settings
        self.place = place
        self.version = _acl.version_of("runtime") or ""
        self.connect_seconds = _connect_seconds()
        self._pool = pool
        self._registered: RegisteredMemory | None = None
        self._registering = threading.Lock()  # HCCL may take its time
        self._batched: bool | None = None
        self._retired: deque[Exchange] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._living = 0

    @property
    def batched(self) -> bool:
        if self._batched is None:
            self._batched = _hccl.batched()
        return self._batched

    @property
    def registered(self) -> RegisteredMemory:
        """The pool, as peers reach it over one-sided links: registered once, by the first of them.

        Raises
        ------
        HcclError
            HCCL refuses.
        """
        with self._registering:
            if self._registered is None:
                self._registered = RegisteredMemory(self.device, self._pool)
            return self._registered

    @property
    def required_place(self) -> LocalPart:
        """Where the device is; one-sided links must be allowed."""
        if self.place is None:
            raise ValueError("one-sided links are not allowed here")
        return self.place

    def objection_to_version(self, version: str) -> str:
        """Say why a peer whose runtime has this version cannot be reached; empty if it can."""
        if version and self.version and version != self.version:
            return f"CANN {self.version} is installed here and {version} there, HCCL wants the same at both ends"
        return ""

    def new_exchange(self) -> Exchange:
        """Begin with the exchange of a link; `retire` must follow."""
        with self._changed:
            self._living += 1
        return Exchange(self.device, self._pool)

    def new_one_sided_exchange(self) -> OneSidedExchange:
        """Begin with the exchange of a one-sided link; `retire` must follow."""
        with self._changed:
            self._living += 1
        return OneSidedExchange(self.device, self._pool)

    def retire(self, exchange: Exchange) -> None:
        """Take an exchange down that nobody uses any more; does not wait. From any thread."""
        with self._changed:
            self._retired.append(exchange)
            if self._thread is None:
                self._thread = threading.Thread(target=self._take_down, name=THREAD_NAME, daemon=True)
                self._thread.start()

    def _take_down(self) -> None:
        while True:
            with self._changed:
                if not self._retired:
                    self._thread = None
                    self._changed.notify_all()
                    return
                exchange = self._retired.popleft()
            try:
                exchange.close()
            except Exception:
                _log.exception("a communicator was not taken down in order")
            with self._changed:
                self._living -= 1

    def close(self, timeout_s: float) -> bool:
        """Wait until every exchange is down, and give the memory up; tells whether the pool may be freed."""
        give_up = time.monotonic() + timeout_s
        with self._changed:
            while self._living or self._thread is not None:
                left = give_up - time.monotonic()
                if left <= 0:
                    _log.error("%d communicators were not taken down within %s s", self._living, timeout_s)
                    return False
                self._changed.wait(left)
        with self._registering:
            registered, self._registered = self._registered, None
        return registered is None or _take_back(registered)


def _take_back(registered: RegisteredMemory) -> bool:
    try:
        registered.close()
    except VendorError as error:
        _log.error("the pool stays taken, since HCCL does not let it go: %s", error)
        return False
    return True


def _connect_seconds() -> float:
    """How long HCCL may need for a communicator."""
    text = os.environ.get(CONNECT_TIMEOUT_VARIABLE, "")
    return float(text) if text.isascii() and text.isdigit() else _CONNECT_SECONDS
