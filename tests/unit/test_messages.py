"""Control messages: what goes in comes out, and nothing else gets through."""

from __future__ import annotations

import dataclasses

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_datadist.control.messages import (
    MAX_MESSAGE_BYTES,
    PROTOCOL_VERSION,
    Accept,
    Hello,
    MemberAccept,
    MemberHello,
    Message,
    MessageError,
    Probe,
    ProbeAnswer,
    Refuse,
    Unlink,
    Unlinked,
    decode,
    encode,
)

uint64 = st.integers(0, 2**64 - 1)
token = st.binary(min_size=16, max_size=16)
text = st.text(max_size=100)
port = st.integers(0, 65535)
rank = st.integers(0, 2**32 - 1)

messages = st.one_of(
    st.builds(
        Hello,
        cluster_id=uint64,
        remote_cluster_id=uint64,
        role=st.integers(1, 3),
        instance=token,
        host=text,
        transports=st.lists(text, max_size=5),
        reason=text,
        timeout_ms=st.integers(1, 2**31 - 1),
        cache_manager=st.booleans(),
    ),
    st.builds(
        Accept,
        cluster_id=uint64,
        instance=token,
        token=token,
        transport=text,
        reason=text,
        rendezvous=text,
        data_host=text,
        data_port=port,
    ),
    st.builds(Refuse, code=uint64, reason=text),
    st.builds(Unlink, cluster_id=uint64, token=token),
    st.builds(Unlinked, code=uint64),
    st.builds(Probe, cluster_id=uint64, token=token),
    st.builds(ProbeAnswer, linked=st.booleans()),
    st.builds(
        MemberHello,
        cluster_id=uint64,
        rank=rank,
        instance=token,
        rank_table=token,
        host=text,
        transports=st.lists(text, max_size=5),
        reason=text,
    ),
    st.builds(MemberAccept, cluster_id=uint64, rank=rank, instance=token, token=token, transport=text, reason=text),
)

HELLO = Hello(1, 2, 2, b"i" * 16, "host", ["shared_memory"], "", 1000, False)


def fields_of(message: Message) -> dict[str, object]:
    fields = msgpack.unpackb(encode(message))
    assert isinstance(fields, dict)
    return fields


@given(messages)
def test_round_trip(message: Message) -> None:
    assert decode(encode(message)) == message


def test_unknown_fields_are_ignored() -> None:
    assert decode(msgpack.packb({**fields_of(HELLO), "later": [1, 2]})) == HELLO


@pytest.mark.parametrize("version", [0, PROTOCOL_VERSION + 1, "1", None, True])
def test_another_version_is_refused(version: object) -> None:
    with pytest.raises(MessageError, match="protocol version"):
        decode(msgpack.packb({**fields_of(HELLO), "v": version}))


@pytest.mark.parametrize("name", ["", "hallo", 5, None, ["hello"]])
def test_an_unknown_name_is_refused(name: object) -> None:
    with pytest.raises(MessageError, match="unknown message"):
        decode(msgpack.packb({**fields_of(HELLO), "t": name}))


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Hello)])
@pytest.mark.parametrize("value", [None, 1.5, {"a": 1}, [1]])
def test_a_field_of_another_type_is_refused(field: str, value: object) -> None:
    with pytest.raises(MessageError, match=f"Hello.{field}"):
        decode(msgpack.packb({**fields_of(HELLO), field: value}))


def test_a_missing_field_is_refused() -> None:
    fields = fields_of(HELLO)
    del fields["host"]
    with pytest.raises(MessageError, match="Hello.host is None"):
        decode(msgpack.packb(fields))


def test_long_messages_and_long_fields_are_refused() -> None:
    with pytest.raises(MessageError, match="at most"):
        decode(bytes(MAX_MESSAGE_BYTES + 1))
    for field, value in (("host", "x" * 9000), ("instance", b"x" * 9000), ("transports", ["x"] * 65)):
        with pytest.raises(MessageError):
            decode(msgpack.packb({**fields_of(HELLO), field: value}))


@given(st.binary(max_size=300))
def test_noise_is_refused_and_never_raises_anything_else(data: bytes) -> None:
    with pytest.raises(MessageError):
        decode(data)


@given(messages, st.data())
def test_a_damaged_message_is_read_or_refused(message: Message, data: st.DataObject) -> None:
    raw = bytearray(encode(message))
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        decode(bytes(raw))
    except MessageError:
        pass
