"""Misspelt options are ignored, and said so."""

from __future__ import annotations

import logging

import pytest

from llm_datadist.known_options import warn_of_unknown


@pytest.fixture(autouse=True)
def warnings_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "llm_datadist")


def test_a_misspelt_key_is_named_with_the_right_one(caplog: pytest.LogCaptureFixture) -> None:
    warn_of_unknown({"llm.ListenIpInfo": "127.0.0.1:1", "llm.SyncKvCacheWaitTime": "5"})
    assert [record.getMessage() for record in caplog.records] == [
        "option llm.ListenIpInfo is unknown and ignored, did you mean llm.listenIpInfo?"
    ]


def test_a_key_like_no_other_has_no_hint(caplog: pytest.LogCaptureFixture) -> None:
    warn_of_unknown({"llm.x": "1"})
    assert [record.getMessage() for record in caplog.records] == ["option llm.x is unknown and ignored"]


def test_known_keys_and_keys_of_others_are_fine(caplog: pytest.LogCaptureFixture) -> None:
    warn_of_unknown({"llm.BufPoolCfg": "{}", "ge.exec.deviceId": "0", "my.own": "1"})
    assert not caplog.records
