"""Integer enumerations that print with the name of their class."""

from __future__ import annotations

from enum import IntEnum


class QualifiedIntEnum(IntEnum):
    """An integer whose text, also inside a format string, is ``Class.MEMBER`` in every version of Python."""

    def __str__(self) -> str:
        return f"{type(self).__name__}.{self.name}"

    def __format__(self, format_spec: str) -> str:
        return str.__format__(str(self), format_spec)
