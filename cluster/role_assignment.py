"""Which rank has which role, from one line of text."""

from __future__ import annotations

from llm_datadist import LLMRole

__all__ = ["assign_roles", "parse_role"]

_PLURALS = {"prompts": LLMRole.PROMPT, "decoders": LLMRole.DECODER, "mixes": LLMRole.MIX}
_REST = {LLMRole.PROMPT: LLMRole.DECODER, LLMRole.DECODER: LLMRole.PROMPT}
_EXAMPLES = "'prompts=2', 'prompts=2,decoders=3' or 'PROMPT,DECODER,DECODER'"


def parse_role(text: str) -> LLMRole:
    """Read the name of a role, in capitals or not.

    Raises
    ------
    ValueError
        It names no role.

    Examples
    --------
    >>> from llm_datadist.cluster.role_assignment import parse_role
    >>> parse_role("decoder") is LLMRole.DECODER
    True
    """
    role = LLMRole.__members__.get(text.strip().upper())
    if role is None:
        raise ValueError(f"role is {text!r}, should be one of {', '.join(LLMRole.__members__)}")
    return role


def assign_roles(roles: str, world_size: int) -> tuple[LLMRole, ...]:
    """Give each rank its role.

    Parameters
    ----------
    roles : str
        Either how many there are of each, in the order of the ranks: ``"prompts=2,decoders=3"``, with ``mixes`` as the
        third word. With one word the other ranks are decoders, or prompts if the word is ``decoders``. Or the role of
        each rank: ``"PROMPT,DECODER,DECODER"``.
    world_size : int
        Number of ranks, at least 1.

    Returns
    -------
    tuple of LLMRole
        By rank, `world_size` of them.

    Raises
    ------
    ValueError
        The text is neither, or does not fit the number of ranks.

    Examples
    --------
    >>> from llm_datadist.cluster.role_assignment import assign_roles
    >>> [role.name for role in assign_roles("prompts=1", 3)]
    ['PROMPT', 'DECODER', 'DECODER']
    """
    parts = [part.strip() for part in roles.split(",")]
    assigned = _counted(roles, parts, world_size) if "=" in roles else tuple(_listed(roles, part) for part in parts)
    if len(assigned) != world_size:
        raise ValueError(f"roles {roles!r} are for {len(assigned)} ranks, but there are {world_size}")
    return assigned


def _counted(roles: str, parts: list[str], world_size: int) -> tuple[LLMRole, ...]:
    counts: dict[LLMRole, int] = {}
    for part in parts:
        word, _, number = (piece.strip() for piece in part.partition("="))
        role = _PLURALS.get(word.lower())
        if role is None or not (number.isascii() and number.isdigit()):
            raise ValueError(f"roles are {roles!r}, with {part!r} in it; should be like {_EXAMPLES}")
        if role in counts:
            raise ValueError(f"roles are {roles!r}, with {word!r} twice")
        counts[role] = int(number)
    total = sum(counts.values())
    if total > world_size:
        raise ValueError(f"roles {roles!r} are for {total} ranks, but there are {world_size}")
    (first, *others) = counts
    if not others and first in _REST:
        counts[_REST[first]] = world_size - total
    return tuple(role for role, count in counts.items() for _ in range(count))


def _listed(roles: str, part: str) -> LLMRole:
    try:
        return parse_role(part)
    except ValueError as error:
        raise ValueError(f"roles are {roles!r}; {error}; roles should be like {_EXAMPLES}") from None
