"""Output of several processes on one screen: whole lines, each with the name of its process in front."""

from __future__ import annotations

import os
import select
from collections.abc import Iterable, Sequence

__all__ = ["LineBuffer", "PrefixedOutput"]

# Cyan, yellow, green, magenta, blue, then their bright forms: red is left to what the processes write themselves.
_COLOURS = (36, 33, 32, 35, 34, 96, 93, 92, 95, 94)
_MAX_LINE = 65536  # bytes; a longer line is cut, so that a process that never ends one costs no memory


class LineBuffer:
    """Cuts a stream of bytes into lines."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """Take bytes, and give the lines that they complete, without their ends."""
        *lines, rest = (self._rest + data).split(b"\n")
        while len(rest) > _MAX_LINE:
            lines.append(rest[:_MAX_LINE])
            rest = rest[_MAX_LINE:]
        self._rest = rest
        return [line.removesuffix(b"\r") for line in lines]

    def end(self) -> list[bytes]:
        """Give the last line, if it has no end."""
        return self.feed(b"\n") if self._rest else []


class PrefixedOutput:
    """Two streams, to which lines are written with the name of their process.

    Parameters
    ----------
    names : sequence of str
        Names of the processes.
    descriptors : sequence of int
        Where their standard output and their standard error go.
    coloured : sequence of bool
        For each of the two, whether names are coloured.
    """

    def __init__(self, names: Sequence[str], descriptors: Sequence[int], coloured: Sequence[bool]) -> None:
        width = max(map(len, names), default=0)
        self._descriptors = tuple(descriptors)
        self._prefixes = [
            {name: _prefix(name.ljust(width), index, colours) for index, name in enumerate(names)}
            for colours in coloured
        ]

    def write(self, name: str, stream: int, lines: Iterable[bytes]) -> None:
        """Write lines of a process to stream 0 or 1 of the two; it returns when all of them are out.

        Raises
        ------
        OSError
            They cannot be written, such as BrokenPipeError where the reader has gone.
        """
        prefix = self._prefixes[stream][name]
        data = memoryview(b"".join(b"%b%b\n" % (prefix, line) for line in lines))
        descriptor = self._descriptors[stream]
        while data:
            try:
                data = data[os.write(descriptor, data) :]
            except BlockingIOError:  # somebody else who has this terminal or pipe made it so
                select.select([], [descriptor], [])


def _prefix(name: str, index: int, coloured: bool) -> bytes:
    text = f"{name} | "
    return (f"\x1b[{_COLOURS[index % len(_COLOURS)]}m{text}\x1b[0m" if coloured else text).encode()
