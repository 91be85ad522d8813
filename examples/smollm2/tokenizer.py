"""The tokenizer of the GGUF file: byte-level BPE, digits one by one, and the chat template of SmolLM2-Instruct."""

from __future__ import annotations

from collections.abc import Sequence

from gguf import GGUFReader, TokenType
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from .gguf_file import metadata

SYSTEM_MESSAGE = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


class ChatTokenizer:
    """Turns a user's message into the token ids of a chat, and token ids into text.

    Parameters
    ----------
    reader : GGUFReader
        The model file, see `open_model`; its vocabulary, merges and special tokens are used.
    """

    def __init__(self, reader: GGUFReader) -> None:
        vocabulary = list(metadata(reader, "tokenizer.ggml.tokens"))
        merges = [tuple(merge.split(" ", 1)) for merge in metadata(reader, "tokenizer.ggml.merges")]
        kinds = metadata(reader, "tokenizer.ggml.token_type")
        special = [token for token, kind in zip(vocabulary, kinds) if kind == TokenType.CONTROL]
        tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(vocabulary)}, merges))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
        # A message that spells out a special token is text: only the template puts special tokens in.
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        self.num_tokens = len(vocabulary)
        self._turn_start = vocabulary.index("<|im_start|>")
        self.end_of_turn = int(metadata(reader, "tokenizer.ggml.eos_token_id"))

    def encode(self, text: str) -> list[int]:
        """Return the token ids of plain text."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_chat(self, message: str, system: str = SYSTEM_MESSAGE) -> list[int]:
        """Return the token ids of a chat with one message of the user, up to where the assistant's answer begins."""
        turns = [f"system\n{system}", f"user\n{message}"]
        line_end = self.encode("\n")
        ids: list[int] = []
        for turn in turns:
            ids += [self._turn_start, *self.encode(turn), self.end_of_turn, *line_end]
        return [*ids, self._turn_start, *self.encode("assistant\n")]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of `token_ids`, without special tokens."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))


class TextStream:
    """The text of a growing list of tokens, piece by piece."""

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer
        self._token_ids: list[int] = []
        self._shown = 0

    def push(self, token_id: int) -> str:
        """Add a token and return the text that became certain by it; empty while a character is incomplete."""
        self._token_ids.append(token_id)
        text = self._tokenizer.decode(self._token_ids)
        if text.endswith("\ufffd"):
            return ""
        piece = text[self._shown :]
        self._shown = len(text)
        return piece
