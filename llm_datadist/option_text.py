"""Values of the options dictionary: text, and numbers written as text."""

from __future__ import annotations

from llm_datadist.arguments import check_isinstance
from llm_datadist.status import InvalidArgument


def is_decimal(text: str) -> bool:
    """Tell whether text consists of the digits 0 to 9, at least one."""
    return text.isascii() and text.isdigit()


def option_text(options: dict[str, str], key: str) -> str | None:
    """Give the value of an option, None if it is absent; raises TypeError if it is no str."""
    if key not in options:
        return None
    check_isinstance(key, options[key], str, allow_none=False)
    return options[key]


def option_number(name: str, text: str | None, low: int, high: int) -> int | None:
    """Read a decimal number, None for None.

    Raises
    ------
    LLMException
        LLM_PARAM_INVALID: the text is no decimal number in [low, high].
    """
    if text is None:
        return None
    # The length is looked at first: Python refuses to convert very long numbers.
    if not is_decimal(text) or len(text) > len(str(high)) or not low <= int(text) <= high:
        raise InvalidArgument(f"{name} is {text[:64]!r}, should be a decimal number in [{low}, {high}]")
    return int(text)
