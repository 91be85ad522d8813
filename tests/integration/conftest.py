"""What tests in here start with: a linked pair of processes, or an instance in the test's own process."""

from tests.own_instance import decoder, open_datadist, prompt
from tests.pair import pair

__all__ = ["decoder", "open_datadist", "pair", "prompt"]
