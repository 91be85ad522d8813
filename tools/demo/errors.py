"""How a run of the demo fails."""

from __future__ import annotations


class DemoError(Exception):
    """The run could not be completed; the text says why, with the traceback of a worker if there is one."""


class BadInputError(DemoError):
    """A prompt cannot be processed."""
