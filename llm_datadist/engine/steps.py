"""The steps of a handshake that runs in the control thread: generators that yield whenever they would have to wait.

What is yielded says what for: `WRITABLE`, or None for words of the other side. Steps may also be resumed without that,
and have to look for themselves whether they can go on.
"""

from __future__ import annotations

from collections.abc import Generator
from enum import Enum
from typing import Optional, TypeVar


class Wait(Enum):
    """What a step waits for, besides words of the other side."""

    WRITABLE = 1  # the connection is made, or has failed


WRITABLE = Wait.WRITABLE

_Result = TypeVar("_Result")

Steps = Generator[Optional[Wait], None, _Result]
