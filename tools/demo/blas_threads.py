"""How many threads the processes of the demo compute with."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

# Prefill and decode each have one of the two cores; a BLAS that starts threads of its own would make them fight.
_VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS")


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """Set environment variables, which processes inherit that are started until the block ends."""
    before = {name: os.environ.get(name) for name in _VARIABLES}
    os.environ.update(dict.fromkeys(_VARIABLES, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
