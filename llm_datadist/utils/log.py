"""The logger's functions, under the name that existing programs import."""

from __future__ import annotations

import logging

from llm_datadist.log import logger

__all__ = ["error", "get_logger", "info", "warn"]

info = logger.info
warn = logger.warning
error = logger.error


def get_logger() -> logging.Logger:
    """Give the library's logger."""
    return logger
