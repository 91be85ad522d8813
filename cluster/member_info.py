"""What the registry knows about one member of a cluster, and what can happen to it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from llm_datadist.roles import LLMRole

STARTING = "starting"
READY = "ready"
DRAINING = "draining"

# In these states a member is there, but nobody should link to it or begin a transfer with it. A program may use words
# of its own for other states; they all count as ready.
UNAVAILABLE_STATES = frozenset({STARTING, DRAINING})


@dataclass(frozen=True)
class MemberInfo:
    """A process that has announced itself.

    Attributes
    ----------
    cluster_id : int
        Its name for others, uint64.
    role : LLMRole
        What it does.
    listen_ip_info : str
        Where it accepts links: ``host:port``, one for each device, joined by ``;``. Empty if it does not listen.
    devices : tuple of int
        Ids of its devices.
    state : str
        ``"starting"``, ``"ready"``, ``"draining"``, or a word of the program.
    labels : dict of str to str
        Whatever the program says about itself.
    instance : bytes
        16 random bytes that tell a process from another one that takes its cluster id later.
    host : str
        Name of the host that it runs on.
    pid : int
        Its process id there.
    lease_s : float
        Seconds after its last word after which it counts as gone.
    follows : bool
        Whether it stops its transfers with a member that drains, and says so.
    switch_token : int
        Fencing token of the role switch for which it drains; 0 if it does not.
    revision : int
        Number of the change at the registry that made it what it is.
    """

    cluster_id: int
    role: LLMRole
    listen_ip_info: str = ""
    devices: tuple[int, ...] = (0,)
    state: str = READY
    labels: dict[str, str] = field(default_factory=dict)
    instance: bytes = b""
    host: str = ""
    pid: int = 0
    lease_s: float = 0.0
    follows: bool = False
    switch_token: int = 0
    revision: int = 0

    @property
    def available(self) -> bool:
        """Whether it may be linked to and transferred with."""
        return self.state not in UNAVAILABLE_STATES

    def matches(self, role: LLMRole | None = None, labels: dict[str, str] | None = None) -> bool:
        """Tell whether it has a role (None: any) and all of some labels."""
        if role is not None and self.role is not role:
            return False
        return all(self.labels.get(name) == value for name, value in (labels or {}).items())


class ChangeKind(Enum):
    """What happened to a member."""

    JOIN = "join"  # it was not there before
    LEAVE = "leave"  # it has withdrawn, or its lease has ended
    ROLE = "role"  # it has another role
    UPDATE = "update"  # anything else that it announces


@dataclass(frozen=True)
class Change:
    """One change in the cluster.

    Attributes
    ----------
    kind : ChangeKind
        What happened.
    member : MemberInfo
        The member after the change; after a LEAVE as it was last known.
    previous : MemberInfo or None
        The member before the change; None after a JOIN.
    expired : bool
        For a LEAVE, whether its lease ended, rather than that it withdrew.
    """

    kind: ChangeKind
    member: MemberInfo
    previous: MemberInfo | None = None
    expired: bool = False
