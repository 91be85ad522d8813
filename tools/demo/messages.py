"""What the processes of the demo tell each other; each travels pickled over the pipe between a worker and its parent.

Requests are named by their number. Times are seconds of the monotonic clock, which all processes of a host share. A
logits checksum is the CRC-32 of all logits of an answer up to now, in the order of its tokens: one wrong bit in the KV
cache shows in it, while most of them change no token.
"""

from __future__ import annotations

from typing import NamedTuple


class Listening(NamedTuple):
    """Prefill worker: the model is loaded and decoders can link. Forwarded to the decode worker."""

    port: int
    prompt_tokens: list[int]  # of each request


class PrefillProgress(NamedTuple):
    """Prefill worker: so many tokens of the prompt are done."""

    request: int
    tokens: int


class Prefilled(NamedTuple):
    """Prefill worker: the KV cache is ready to be pulled. Forwarded to the decode worker."""

    request: int
    prompt_tokens: int
    first_token: int
    logits_checksum: int
    started_s: float
    prefill_s: float
    blocks: list[int]  # block table in mode "blocks"; empty in mode "cache"


class AllPrefilled(NamedTuple):
    """Parent to decode worker: no further request will come."""


class Pulled(NamedTuple):
    """Decode worker: the KV cache has arrived. Forwarded to the prefill worker, which may use its memory again."""

    request: int
    place: str  # where it lies now, in words
    nbytes: int
    pull_s: float


class Decoded(NamedTuple):
    """Decode worker: text that a step of the batch added, as (request, piece)."""

    pieces: list[tuple[int, str]]


class Answered(NamedTuple):
    """Decode worker: the answer is complete."""

    request: int
    token_ids: list[int]
    logits_checksum: int
    text: str
    first_decoded_s: float | None  # None if the first token, which the prefill made, was the only one
    decode_s: float  # from the end of the pull to the last token


class AllAnswered(NamedTuple):
    """Parent to prefill worker: the decoder has pulled everything and has unlinked."""


class PoolLevel(NamedTuple):
    """Prefill or decode worker, at its end: bytes of its pool after every cache was given back."""

    capacity: int
    peak: int
    used: int


class Referenced(NamedTuple):
    """Reference worker: the answer of the model in one process."""

    request: int
    token_ids: list[int]
    logits_checksum: int


class Failed(NamedTuple):
    """Any worker: it cannot go on."""

    text: str  # one line if the input is to blame, else a traceback
    bad_input: bool
