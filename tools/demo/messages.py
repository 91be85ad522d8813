"""What the processes of the demo tell each other.

Between the workers of one host and their parent they travel pickled over a pipe, between services and the program that
drives them as `network/wire.py` writes them. Requests are named by a number. Times are seconds of the monotonic clock,
which all processes of a host share. A logits checksum is the CRC-32 of all logits of an answer up to now, in the order
of its tokens: one wrong bit in the KV cache shows in it, while most of them change no token.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Listening:
    """Prefill worker: the model is loaded and decoders can link. Forwarded to the decode worker."""

    port: int
    prompt_tokens: list[int]  # of each request


@dataclass(frozen=True)
class Prefill:
    """To a prompt service: prefill this."""

    request: int
    token_ids: list[int]
    max_new_tokens: int  # that the decoder will make, so that both together fit


@dataclass(frozen=True)
class PrefillProgress:
    """Prefill: so many tokens of the prompt are done."""

    request: int
    tokens: int


@dataclass(frozen=True)
class Prefilled:
    """Prefill: the KV cache is ready to be pulled. Forwarded to the decode worker or service."""

    request: int
    prompt_cluster: int  # whose cache it is
    prompt_tokens: int
    max_new_tokens: int
    first_token: int
    logits_checksum: int
    started_s: float
    prefill_s: float
    copy_s: float  # from the host into the cache; 0 if the model computes in the cache
    blocks: list[int]  # block table in mode "blocks"; empty in mode "cache"


@dataclass(frozen=True)
class AllPrefilled:
    """Parent to decode worker: no further request will come."""


@dataclass(frozen=True)
class Pulled:
    """Decode: the KV cache has arrived. Forwarded to the prefill, which may use its memory again."""

    request: int
    place: str  # where it lies now, in words
    nbytes: int
    pull_s: float
    copy_s: float  # from the cache to the host; 0 if the model computes in the cache
    transport: str  # of the link


@dataclass(frozen=True)
class Decoded:
    """Decode: text that a step of the batch added, as (request, piece)."""

    pieces: list[tuple[int, str]]


@dataclass(frozen=True)
class Answered:
    """Decode: the answer is complete."""

    request: int
    token_ids: list[int]
    logits_checksum: int
    text: str
    first_decoded_s: float | None  # None if the first token, which the prefill made, was the only one
    decode_s: float  # from the end of the pull to the last token


@dataclass(frozen=True)
class AllAnswered:
    """Parent to prefill worker: the decoder has pulled everything and has unlinked."""


@dataclass(frozen=True)
class Cancel:
    """To a service: nobody wants this request any more."""

    request: int


@dataclass(frozen=True)
class RequestFailed:
    """Prefill or decode: this request cannot go on here; others can."""

    request: int
    reason: str
    bad_input: bool  # it cannot go on anywhere


@dataclass(frozen=True)
class LevelQuery:
    """To a service: how full is your pool? Answered by a ServiceLevel."""


@dataclass(frozen=True)
class PoolLevel:
    """Prefill or decode worker, at its end: bytes of its pool after every cache was given back."""

    capacity: int
    peak: int
    used: int


@dataclass(frozen=True)
class ServiceLevel:
    """Service: bytes of its pool, and the requests that explain them."""

    capacity: int
    peak: int
    used: int  # beyond what it holds when it is idle
    yours: int  # requests of the one that asks
    others: int


@dataclass(frozen=True)
class StillHere:
    """Service, now and then, to everybody whose requests it has. What counts is whether it can be sent."""


@dataclass(frozen=True)
class Referenced:
    """Reference worker: the answer of the model in one process."""

    request: int
    token_ids: list[int]
    logits_checksum: int


@dataclass(frozen=True)
class Failed:
    """Any worker of this host: it cannot go on."""

    text: str  # one line if the input is to blame, else a traceback
    bad_input: bool
