"""The messages of the network demo as bytes: whole round trips, and bytes that are none."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_datadist.tools.demo import messages
from llm_datadist.tools.demo.network.wire import MAX_MESSAGE_BYTES, WireError, decode, encode

EXAMPLES = [
    messages.Prefill(2**63, [1, 2, 49_151], 48),
    messages.PrefillProgress(1, 32),
    messages.Prefilled(1, 2**64 - 2, 44, 48, 7, 2**32 - 1, 5.5, 0.25, 0.125, [3, 1, 2]),
    messages.Pulled(1, "slot 0", 1_013_760, 0.001, 0.0, "tcp"),
    messages.Decoded([(1, "He"), (2, "ünï")]),
    messages.Answered(1, [7, 8], 99, "Hello", None, 0.5),
    messages.Answered(1, [7, 8], 99, "Hello", 5.5, 0.5),
    messages.Cancel(1),
    messages.RequestFailed(1, "no link", bad_input=False),
    messages.LevelQuery(),
    messages.ServiceLevel(100, 50, 0, 2, 1),
    messages.StillHere(),
]


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: type(message).__name__)
def test_a_message_comes_back_as_it_was(message: Any) -> None:
    found = decode(encode(message))
    assert type(found) is type(message)
    if isinstance(message, messages.Decoded):  # tuples become lists
        assert [tuple(piece) for piece in found.pieces] == message.pieces
    else:
        assert found == message


@pytest.mark.parametrize(
    ("items", "reason"),
    [
        (7, "unknown message"),
        ([], "unknown message"),
        (["Failed", "text", False], "unknown message"),
        ([["Cancel"], 1], "unknown message"),
        (["Cancel"], "Cancel with 0 fields, should be 1"),
        (["Cancel", 1, 2], "Cancel with 2 fields, should be 1"),
        (["Cancel", -1], "Cancel.request is -1, should be int"),
        (["Cancel", True], "Cancel.request is True, should be int"),
        (["Cancel", "1"], "Cancel.request is '1', should be int"),
        (["Prefill", 1, [1, -2], 3], "Prefill.token_ids"),
        (["Prefill", 1, "12", 3], "Prefill.token_ids"),
        (["Decoded", [[1]]], "Decoded.pieces"),
        (["Decoded", [[1, 2]]], "Decoded.pieces"),
        (["RequestFailed", 1, "why", 0], "RequestFailed.bad_input"),
        (["Pulled", 1, "slot", 1, 1, 0.0, "tcp"], "Pulled.pull_s is 1, should be float"),
        (["Cancel", {"a": 1}], "not readable"),
    ],
)
def test_what_is_no_message_is_refused(items: Any, reason: str) -> None:
    with pytest.raises(WireError, match=reason):
        decode(msgpack.packb(items))


def test_what_is_too_long_is_refused() -> None:
    with pytest.raises(WireError, match="at most"):
        decode(bytes(MAX_MESSAGE_BYTES + 1))


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_refused(data: bytes) -> None:
    try:
        decode(data)
    except WireError:
        pass


@given(st.sampled_from(EXAMPLES), st.data())
def test_a_cut_message_is_refused(message: Any, data: st.DataObject) -> None:
    whole = encode(message)
    with pytest.raises(WireError):
        decode(whole[: data.draw(st.integers(0, len(whole) - 1))])
