"""Which process this is: a mark that another process, a forked child too, does not have. Cheaper to read than a pid."""

from __future__ import annotations

import os


class ProcessMark:
    """The mark of this process, in `current`."""

    current = object()


def _renew() -> None:
    ProcessMark.current = object()


os.register_at_fork(after_in_child=_renew)
