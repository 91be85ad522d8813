"""The linked pair of processes that most tests in here start with."""

from tests.pair import pair

__all__ = ["pair"]
