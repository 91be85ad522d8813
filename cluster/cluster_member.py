"""A process as a member of a cluster: found by others, finding them, linked to them, and able to change its role."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from types import TracebackType

from llm_datadist.cluster.announcement import Announcement
from llm_datadist.cluster.cluster_watch import ClusterWatch
from llm_datadist.cluster.follower import Follower, OnChange, Wanted
from llm_datadist.cluster.member_info import MemberInfo
from llm_datadist.cluster.peer_links import PeerLinks, is_good, listen_addresses
from llm_datadist.cluster.registry_address import RegistryAddress, parse_registry_address
from llm_datadist.cluster.registry_connection import RegistryConnection
from llm_datadist.cluster.registry_messages import INSTANCE_BYTES, Announce, Message, OrderDone, Switch
from llm_datadist.cluster.role_switch import OnPhase, RoleSwitch
from llm_datadist.cluster.transfer_gates import Transfer, TransferGates
from llm_datadist.datadist import LLMDataDist
from llm_datadist.introspection import current_role
from llm_datadist.roles import LLMRole
from llm_datadist.status import InvalidArgument, LLMException, LLMStatusCode

_log = logging.getLogger("llm_datadist.cluster")

DEFAULT_LEASE_S = 10.0
_WITHDRAW_S = 1.0
_JOIN_S = 10.0
_REPORT_S = 30.0
_MOST_ORDER_S = 3600.0
_LINK_TRY_S = 3.0
_MOST_ORDERS = 64  # remembered, so that one that comes twice is done once
_LISTEN_OPTION = "llm.listenIpInfo"
_ANYWHERE = "192.0.2.1"  # of a network for documentation (RFC 5737): only the way to it is asked for
_WILDCARDS = ("0.0.0.0", "*", "::")

OnRole = Callable[[LLMRole], None]


class ClusterMember:
    """A member of a cluster; a context manager.

    Its threads are daemons and end with `close`. The registry may be started later, or again: what the member says is
    said again, and links go on without it.

    Parameters
    ----------
    datadist : LLMDataDist or None
        Initialised. None for a process that only looks at the cluster.
    registry : str
        ``tcp://host:port``.
    cluster_id : int, optional
        Its name for others. By default that of `datadist`.
    listen_ip_info : str
        Where it accepts links, ``host:port``, one for each device, joined by ``;``. A DECODER that may become PROMPT
        gives where it would listen. For ``0.0.0.0`` the address of this host towards the registry is announced.
    labels : mapping of str to str, optional
        Whatever others should know.
    role : LLMRole, optional
        Only without `datadist`, whose role it is otherwise.
    devices : sequence of int
        Ids of its devices.
    lease_s : float
        Seconds without a word after which it counts as gone. It is renewed by a thread of this interpreter, so it
        should be longer than any time in which the interpreter lock is held.
    local_address : str, optional
        IPv4 address of this process for link calls. By default that of this host towards the registry.
    on_role : callable, optional
        Gets the new role after a switch, in the thread that switches.

    Raises
    ------
    TypeError, ValueError
        An argument has the wrong type or cannot be.

    Examples
    --------
    >>> from llm_datadist.cluster import ClusterMember
    >>> with ClusterMember(None, "tcp://127.0.0.1:5510") as driver:
    ...     driver.role is None
    True
    """

    def __init__(
        self,
        datadist: LLMDataDist | None,
        registry: str,
        cluster_id: int | None = None,
        listen_ip_info: str = "",
        labels: Mapping[str, str] | None = None,
        role: LLMRole | None = None,
        devices: Sequence[int] = (0,),
        lease_s: float = DEFAULT_LEASE_S,
        local_address: str | None = None,
        on_role: OnRole | None = None,
    ) -> None:
        address = parse_registry_address(registry)
        cluster_id = _own_id(datadist, cluster_id, role)
        if listen_ip_info:
            listen_addresses(listen_ip_info)
        if lease_s <= 0:
            raise ValueError(f"lease_s is {lease_s}, should be positive")
        self._datadist = datadist
        self._given_role = role
        self._cluster_id = cluster_id
        self._listen_ip_info = listen_ip_info
        self._address = address
        self._on_role = on_role
        self._local_address = local_address
        self._gates = TransferGates()
        self._links = None
        if datadist is not None:
            self._links = PeerLinks(datadist, self._gates, self._own_address(), len(devices))
        self._connection = RegistryConnection(address, self._take_unasked)
        self._watch = ClusterWatch(self._connection, lambda changes: self._follower.take(changes))
        self._follower = Follower(
            cluster_id, lambda: self.role, self._connection, self._watch, self._gates, self._links
        )
        self._announcement = Announcement(self._connection, self._first_announce(labels, devices, lease_s))
        self._switching = threading.Lock()
        self._orders_lock = threading.Lock()  # guards the two below
        self._orders: OrderedDict[bytes, OrderDone | None] = OrderedDict()  # None while it is carried out
        self._order_threads: list[threading.Thread] = []
        self._is_closing = threading.Event()

    def __enter__(self) -> ClusterMember:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def cluster_id(self) -> int | None:
        """Its cluster id; None for a process that only looks."""
        return self._cluster_id

    @property
    def role(self) -> LLMRole | None:
        """Its role now; None for a process that only looks."""
        return self._given_role if self._datadist is None else current_role(self._datadist)

    @property
    def state(self) -> str:
        """What it has announced as its state."""
        return self._announcement.said.state

    # ---- announce

    def announce(self, state: str = "ready", labels: Mapping[str, str] | None = None, timeout_s: float = 10.0) -> None:
        """Tell the cluster about this process; again to tell another state or other labels.

        While another living process has the cluster id this waits. A member with a `datadist` follows from now on what
        it must: when a peer drains, its transfers with the peer end, see `transfer`.

        Parameters
        ----------
        state : str
            ``"ready"``; ``"starting"``: nobody should link yet; or a word of the program, which counts as ready.
        labels : mapping of str to str, optional
            In place of those before.
        timeout_s : float
            Seconds for the whole call.

        Raises
        ------
        ValueError
            The process has no cluster id or no role, or is a PROMPT without an address.
        LLMException
            LLM_TIMEOUT: no answer in time; it will be announced when the registry is there. LLM_FAILED: the registry
            refused, or the id belongs to another process. LLM_PROCESSING_LINK: a role switch did not end in time.
        """
        if self._cluster_id is None or self.role is None:
            raise ValueError("a process without cluster id and role cannot announce itself, give it both")
        if self._links is not None and self.role is LLMRole.PROMPT and not self._listen_ip_info:
            raise ValueError("a PROMPT cannot be linked to without its address, give it listen_ip_info")
        changes: dict[str, object] = {"state": state}
        if labels is not None:
            changes["labels"] = dict(labels)
        if self._links is not None:
            self._watch.start()
            if not self._follower.is_running:
                self._follower.start(Wanted(link=False), None, [])
        deadline = time.monotonic() + timeout_s
        # While the role changes the state is the switch's; the place may be another one afterwards.
        if not self._switching.acquire(timeout=max(0.0, timeout_s)):
            reason = "announce: a role switch is under way"
            raise LLMException(reason, status_code=LLMStatusCode.LLM_PROCESSING_LINK)
        try:
            self._announcement.put({**changes, **self._place()}, max(0.0, deadline - time.monotonic()))
        finally:
            self._switching.release()

    def withdraw(self, timeout_s: float = _WITHDRAW_S) -> None:
        """Leave the registry; links stay."""
        self._announcement.withdraw(timeout_s)

    # ---- look

    def members(self, role: LLMRole | None = None, labels: Mapping[str, str] | None = None) -> list[MemberInfo]:
        """List the other members that are known now, by cluster id; `wait_for` or `follow` begin to look."""
        self._watch.start()
        return _select(self._watch.members(), self._cluster_id, role, labels)

    def wait_for(
        self,
        role: LLMRole | None = None,
        count: int = 1,
        timeout_s: float = 60.0,
        labels: Mapping[str, str] | None = None,
        state: str | None = None,
    ) -> list[MemberInfo]:
        """Wait until there are other members.

        Parameters
        ----------
        role : LLMRole, optional
            Their role.
        count : int
            How many at least.
        timeout_s : float
            Seconds to wait.
        labels : mapping of str to str, optional
            All of which they have.
        state : str, optional
            Their state. By default any in which they can be linked to.

        Returns
        -------
        list of MemberInfo
            All that there are, by cluster id.

        Raises
        ------
        LLMException
            LLM_TIMEOUT: there are not as many in time.
        """
        if count < 0:
            raise ValueError(f"count is {count}, should be >= 0")

        def found(members: Mapping[int, MemberInfo]) -> list[MemberInfo]:
            fitting = _select(members, self._cluster_id, role, labels)
            return [member for member in fitting if (member.available if state is None else member.state == state)]

        self._watch.start()
        if not self._watch.wait(lambda members: len(found(members)) >= count, time.monotonic() + timeout_s):
            there = found(self._watch.members())
            raise LLMException(
                f"{len(there)} members of {count} were there in {timeout_s} s (role {role}, labels {labels}, state"
                f" {state}): {[member.cluster_id for member in there]}",
                status_code=LLMStatusCode.LLM_TIMEOUT,
            )
        return found(self._watch.members())

    # ---- link

    def link(self, peers: Sequence[MemberInfo], timeout_s: float = 10.0) -> None:
        """Link to members, trying again until the time is over.

        Raises
        ------
        LLMException
            LLM_LINK_FAILED: some could not be linked; the message has their ids and status codes.
        """
        links = self._require_links("link")
        deadline = time.monotonic() + timeout_s
        left = list(peers)
        while left:
            results = links.link(left, min(_LINK_TRY_S, max(0.0, deadline - time.monotonic())))
            self._follower.note_linked([peer for peer in left if is_good(results[peer.cluster_id])])
            left = [peer for peer in left if not is_good(results[peer.cluster_id])]
            if not left:
                return
            if time.monotonic() >= deadline or self._is_closing.wait(0.05):
                failed = {peer.cluster_id: str(results[peer.cluster_id]) for peer in left}
                raise LLMException(f"cannot link to {failed}", status_code=LLMStatusCode.LLM_LINK_FAILED)

    def unlink(self, cluster_ids: Sequence[int], timeout_s: float = 10.0) -> None:
        """Take links down, waiting for transfers that use them.

        Raises
        ------
        LLMException
            LLM_LINK_BUSY: some are still in use; the message has their ids.
        """
        left = self._require_links("unlink").unlink_all(cluster_ids, time.monotonic() + timeout_s)
        if left:
            raise LLMException(f"the links to {left} are in use", status_code=LLMStatusCode.LLM_LINK_BUSY)

    def linked(self) -> list[int]:
        """List the cluster ids of peers that are linked and can be transferred with now."""
        if self._links is not None:
            self._links.states()
        return sorted(self._gates.linked())

    def follow(
        self,
        on_change: OnChange | None = None,
        link: bool = True,
        roles: Collection[LLMRole] | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        """Follow the cluster from now on: link to peers that come, unlink those that leave.

        Parameters
        ----------
        on_change : callable, optional
            Gets every `Change` of another member, in a thread of this object; linking waits while it runs. Members
            that are known already come first, as having joined.
        link : bool
            Whether to link to peers by itself. Peers that have left are unlinked in any case.
        roles : collection of LLMRole, optional
            In cache-manager mode, the roles of peers to link to. By default, and in KV mode always, a DECODER links to
            every PROMPT.
        labels : mapping of str to str, optional
            All of which a peer has that is linked to.
        """
        wanted = Wanted(link and self._links is not None, roles, dict(labels or {}))
        self._watch.start()
        self._watch.with_members(lambda members: self._follower.start(wanted, on_change, members))

    def transfer(self, cluster_id: int, timeout_s: float = 30.0) -> Transfer:
        """Hold the link to a peer while transfers with it run: a role switch of either end waits for them.

        To be used in a ``with`` statement, not inside of another one for the same peer. While the peer or this process
        drains, it waits. A pull outside of it is never cut off either, but it may come when the link has just been
        taken down.

        Parameters
        ----------
        cluster_id : int
            The peer.
        timeout_s : float
            Seconds to wait while something drains.

        Raises
        ------
        LLMException
            LLM_NOT_YET_LINK: the peer is not linked, or not any more. LLM_TIMEOUT: the draining did not end in time.

        Examples
        --------
        ::

            with member.transfer(1):
                datadist.kv_cache_manager.pull_cache(CacheKey(1, req_id=7), cache)
        """
        return Transfer(self._gates, cluster_id, timeout_s, self._links.states if self._links is not None else None)

    # ---- role

    def switch_role(
        self,
        role: LLMRole,
        listen_ip_info: str | None = None,
        timeout_s: float = 60.0,
        on_phase: OnPhase | None = None,
    ) -> None:
        """Take another role, seen by the whole cluster: drain, unlink, switch, announce, link again.

        Peers let their transfers with this member end and begin no new ones; no transfer is cut off. Switches of
        several members happen one after the other. If it fails, the member is what it was.

        Parameters
        ----------
        role : LLMRole
            The new role.
        listen_ip_info : str, optional
            Where it listens from then on, ``ip:port``. By default where it was told to when it was made.
        timeout_s : float
            Seconds for all of it, except for linking again.
        on_phase : callable, optional
            Told when each phase begins, see `SwitchPhase`.

        Raises
        ------
        LLMException
            As `LLMDataDist.switch_role`. LLM_PROCESSING_LINK: a switch of this member is under way. LLM_TIMEOUT: the
            registry does not answer, or others switched all the time. LLM_LINK_BUSY: transfers did not end in time.
            LLM_FAILED: the lock was lost, since this process was held up for longer than its lease.
        """
        links = self._require_links("switch_role")
        if not self._announcement.is_out:
            reason = "switch_role: the member has not announced itself"
            raise LLMException(reason, status_code=LLMStatusCode.LLM_FAILED)
        if role is self.role and not links.cache_manager_mode:
            raise InvalidArgument(f"role not changed: it is {role} already")
        if not self._switching.acquire(blocking=False):
            reason = "switch_role: a switch of this member is under way"
            raise LLMException(reason, status_code=LLMStatusCode.LLM_PROCESSING_LINK)
        try:
            RoleSwitch(
                self._connection,
                self._announcement,
                self._watch,
                self._gates,
                links,
                self._follower,
                lambda: self._change_role(role, listen_ip_info),
                on_phase,
                self._is_closing,
            ).run(timeout_s)
        finally:
            self._switching.release()
        if self._on_role is not None:
            try:
                self._on_role(role)
            except Exception:  # the role has changed all the same
                _log.exception("the callback of the program failed on %s", role)

    def _change_role(self, role: LLMRole, listen_ip_info: str | None) -> dict[str, object]:
        assert self._datadist is not None
        listen = self._listen_ip_info if listen_ip_info is None else listen_ip_info
        self._datadist.switch_role(role, {_LISTEN_OPTION: _numeric(listen)} if listen else None)
        self._listen_ip_info = listen
        return self._place()

    # ---- end

    def close(self) -> None:
        """Withdraw from the registry and end all threads; links stay. May be called twice."""
        self._is_closing.set()
        with self._orders_lock:
            threads = list(self._order_threads)
        for thread in threads:
            thread.join(_JOIN_S)
        if self._switching.acquire(timeout=_JOIN_S):  # a switch sees that it is to give up
            self._switching.release()
        self._follower.stop()
        self._watch.stop()
        self._announcement.withdraw(_WITHDRAW_S)
        self._connection.close()

    # ---- orders from elsewhere

    def _take_unasked(self, message: Message) -> None:
        """Take what the registry sends by itself; in the thread of the connection."""
        if not isinstance(message, Switch) or self._is_closing.is_set():
            return
        with self._orders_lock:
            if message.order in self._orders:
                done = self._orders[message.order]
                if done is not None:  # the report was lost
                    self._connection.request(done, _REPORT_S)
                return
            self._orders[message.order] = None
            while len(self._orders) > _MOST_ORDERS:
                self._orders.popitem(last=False)
            self._order_threads = [thread for thread in self._order_threads if thread.is_alive()]
            thread = threading.Thread(
                target=self._carry_out, args=(message,), name="llm_datadist-role-switch", daemon=True
            )
            self._order_threads.append(thread)
            thread.start()

    def _carry_out(self, order: Switch) -> None:
        code, reason = self._switch_as_ordered(order)
        done = OrderDone(order.order, int(code) & 0xFFFFFFFF, reason[:1000])
        with self._orders_lock:
            self._orders[order.order] = done
        self._connection.request(done, _REPORT_S)

    def _switch_as_ordered(self, order: Switch) -> tuple[LLMStatusCode, str]:
        try:
            role = LLMRole(order.role)
            if role is self.role:
                return LLMStatusCode.LLM_SUCCESS, f"its role is {role} already"
            self.switch_role(role, order.listen_ip_info or None, min(order.timeout_ms / 1000, _MOST_ORDER_S))
        except LLMException as error:
            return error.status_code, str(error)
        except Exception as error:
            _log.exception("an ordered role switch failed")
            return LLMStatusCode.LLM_FAILED, f"{type(error).__name__}: {error}"
        return LLMStatusCode.LLM_SUCCESS, f"its role is {role} now"

    # ---- what is announced

    def _first_announce(self, labels: Mapping[str, str] | None, devices: Sequence[int], lease_s: float) -> Announce:
        return Announce(
            cluster_id=self._cluster_id or 0,
            instance=secrets.token_bytes(INSTANCE_BYTES),
            version=0,
            role=int(self.role or 0),
            listen_ip_info="",
            devices=list(devices),
            state="",
            labels=dict(labels or {}),
            host=socket.gethostname(),
            pid=os.getpid(),
            lease_ms=max(1, int(lease_s * 1000)),
            follows=self._links is not None,
            switch_token=0,
            seen_token=0,
        )

    def _place(self) -> dict[str, object]:
        """Give what is announced of the role: whoever does not listen announces no address."""
        role = self.role
        assert role is not None
        listens = role is LLMRole.PROMPT or self._links is None or self._links.cache_manager_mode
        return {"role": int(role), "listen_ip_info": self._reachable() if listens else ""}

    def _reachable(self) -> str:
        """Give the address to listen at as others can use it."""
        if not self._listen_ip_info:
            return ""
        addresses = listen_addresses(self._listen_ip_info)
        hosts = [self._own_address() if host.strip("[]") in _WILDCARDS else host for host, _ in addresses]
        return ";".join(f"{host}:{port}" for host, (_, port) in zip(hosts, addresses))

    def _own_address(self) -> str:
        """Give the IPv4 address of this host towards the registry."""
        if self._local_address is None:
            self._local_address = _address_towards(self._address)
        return self._local_address

    def _require_links(self, call: str) -> PeerLinks:
        if self._links is None:
            raise LLMException(f"{call} needs a datadist", status_code=LLMStatusCode.LLM_PARAM_INVALID)
        return self._links


def _own_id(datadist: LLMDataDist | None, cluster_id: int | None, role: LLMRole | None) -> int | None:
    if datadist is None:
        return cluster_id
    if role is not None and role is not current_role(datadist):
        raise ValueError(f"role is {role}, but that of the datadist is {current_role(datadist)}: leave it out")
    if cluster_id is not None and cluster_id != datadist.cluster_id:
        raise ValueError(f"cluster_id is {cluster_id}, but that of the datadist is {datadist.cluster_id}: leave it out")
    return datadist.cluster_id


def _select(
    members: Mapping[int, MemberInfo], own_id: int | None, role: LLMRole | None, labels: Mapping[str, str] | None
) -> list[MemberInfo]:
    wanted = dict(labels or {})
    return [
        member
        for cluster_id, member in sorted(members.items())
        if cluster_id != own_id and member.matches(role, wanted)
    ]


def _numeric(listen_ip_info: str) -> str:
    """Give an address to listen at with numbers in place of names."""
    (host, port), *more = listen_addresses(listen_ip_info)
    if more:  # the call says that it is not possible
        return listen_ip_info
    bare = host.strip("[]")
    if ":" in bare:
        return listen_ip_info
    try:
        return f"{socket.getaddrinfo(bare, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0]}:{port}"
    except OSError as error:
        raise InvalidArgument(f"cannot listen at {listen_ip_info!r}: {error}") from error


def _address_towards(registry: RegistryAddress) -> str:
    """Tell with which IPv4 address this host reaches the registry.

    If that has no IPv4 address, or none yet, it is the address towards other networks, else the loopback address.
    """
    for host in (registry.host, _ANYWHERE):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((host, registry.port))  # sends nothing
            except OSError as error:
                _log.info("no way to %s: %s", host, error)
                continue
            return str(probe.getsockname()[0])
    return "127.0.0.1"
