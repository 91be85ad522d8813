"""The logger ``llm_datadist``: its level, and where its messages go if the program has not decided."""

from __future__ import annotations

import logging
import os
import sys

LEVEL_VARIABLE = "ASCEND_GLOBAL_LOG_LEVEL"

_LEVELS = {"0": logging.DEBUG, "1": logging.INFO, "2": logging.WARNING, "3": logging.ERROR}
_FORMAT = "[%(levelname)s] %(name)s(%(process)d) %(asctime)s %(message)s"

logger = logging.getLogger("llm_datadist")


class _DefaultHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to standard output, unless the program has set up logging of its own."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers and sys.stdout is not None:
            self.setStream(sys.stdout)
            super().emit(record)


def set_up_logger() -> None:
    """Set the level from the environment (ERROR by default) and add the handler; again it changes only the level."""
    logger.setLevel(_LEVELS.get(os.environ.get(LEVEL_VARIABLE, ""), logging.ERROR))
    if not logger.handlers:
        handler = _DefaultHandler(sys.stdout)
        handler.setFormatter(logging.Formatter(_FORMAT))
        logger.addHandler(handler)
