"""Instances in the test's own process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from llm_datadist import CacheDesc, DataType, LLMDataDist, LLMException, LLMRole, LLMStatusCode
from tests.datadist_member import make_options

Open = Callable[..., LLMDataDist]


def desc(num_tensors: int, shape: Any, data_type: DataType = DataType.DT_FLOAT16) -> CacheDesc:
    return CacheDesc(num_tensors, shape, data_type)


def expect(code: LLMStatusCode, text: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    with pytest.raises(LLMException, match=text) as raised:
        call(*args, **kwargs)
    assert raised.value.status_code is code


@pytest.fixture
def open_datadist(free_port: Callable[[], int]) -> Iterator[Open]:
    """Make and initialise an instance of a role; it is finalised with the test."""
    opened: list[LLMDataDist] = []

    def open_one(role: LLMRole, cluster_id: int = 1, **options: Any) -> LLMDataDist:
        datadist = LLMDataDist(role, cluster_id)
        opened.append(datadist)
        datadist.init(make_options(role, port=free_port() if role is LLMRole.PROMPT else None, **options))
        return datadist

    yield open_one
    for datadist in opened:
        datadist.finalize()


@pytest.fixture
def prompt(open_datadist: Open) -> LLMDataDist:
    return open_datadist(LLMRole.PROMPT)


@pytest.fixture
def decoder(open_datadist: Open) -> LLMDataDist:
    return open_datadist(LLMRole.DECODER)
