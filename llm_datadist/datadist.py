"""One process in disaggregated serving: its life, its links and its caches."""

from __future__ import annotations

import atexit
import logging
import os
import threading
from typing import TYPE_CHECKING, ClassVar, cast

from llm_datadist.arguments import check_isinstance, check_uint64
from llm_datadist.cache_manager import CacheManager
from llm_datadist.kv_cache_manager import KvCacheManager
from llm_datadist.link_arguments import Clusters, check_link_arguments, cluster_addresses
from llm_datadist.member_links import MemberLinks
from llm_datadist.mode_rules import ModeRules
from llm_datadist.roles import LLMRole
from llm_datadist.status import InvalidArgument, LLMException, LLMStatusCode

if TYPE_CHECKING:
    from llm_datadist.engine.engine import Engine
    from llm_datadist.engine.options import EngineOptions
    from llm_datadist.engine.several_devices import SeveralDevices

_log = logging.getLogger("llm_datadist")

# Held while an instance is initialised or finalised; a signal handler may finalise inside of either.
_life_cycle = threading.RLock()

LinkResult = tuple[LLMStatusCode, list[LLMStatusCode]]


class LLMDataDist(MemberLinks):
    """A process that takes part in the transfer of caches. One instance of a process may be initialised at a time.

    Parameters
    ----------
    role : LLMRole
        What the process does.
    cluster_id : int
        Its name for others, uint64; clusters that link to the same one need different ids.

    Attributes
    ----------
    llm_engine_instance : LLMDataDist or None
        The initialised instance of the process.

    Raises
    ------
    TypeError
        An argument of the wrong type.
    ValueError
        `cluster_id` is out of range.

    Examples
    --------
    >>> from llm_datadist import LLMConfig, LLMDataDist, LLMRole
    >>> config = LLMConfig()
    >>> config.device_id = 0
    >>> datadist = LLMDataDist(LLMRole.MIX, cluster_id=1)
    >>> datadist.init(config.generate_options())
    >>> datadist.kv_cache_manager.is_initialized()
    True
    >>> datadist.finalize()
    """

    llm_engine_instance: ClassVar[LLMDataDist | None] = None

    def __init__(self, role: LLMRole, cluster_id: int) -> None:
        check_isinstance("role", role, LLMRole, allow_none=False)
        self._role = role
        self._cluster_id = check_uint64("cluster_id", cluster_id)
        self._engine: Engine | SeveralDevices | None = None
        self._manager: KvCacheManager | CacheManager | None = None
        self._rules = ModeRules()
        self._pid = 0

    @property
    def cluster_id(self) -> int:
        """The id that the instance was made with."""
        return self._cluster_id

    # ---- life

    def init(self, options: dict[str, str]) -> None:
        """Start the engine; a PROMPT listens from now on. Does nothing if this instance is initialised.

        In cache-manager mode (``llm.EnableCacheManager``) whoever has a ``llm.listenIpInfo`` listens, in any role.

        Parameters
        ----------
        options : dict of str to str
            As `LLMConfig.generate_options` makes them, or made by hand; unknown keys are ignored. On success
            ``llm.Role`` and ``llm.ClusterInfo`` are written into it, except in cache-manager mode. On failure nothing
            is left open, and ``init`` may be called again.

        Raises
        ------
        TypeError
            `options` is no dict, or a value is no str.
        ValueError
            A number in an option cannot be read.
        RuntimeError
            An IP address in an option cannot be parsed.
        LLMException
            LLM_FAILED: another instance is initialised, or the address cannot be listened on. LLM_PARAM_INVALID: an
            option is missing or cannot be used. LLM_DEVICE_OUT_OF_MEMORY, in cache-manager mode LLM_OUT_OF_MEMORY: a
            pool cannot be reserved.
        """
        with _life_cycle:
            if self._is_live():
                return
            live = LLMDataDist.llm_engine_instance
            if live is not None and live._is_live():
                raise LLMException(
                    f"Cannot init multiple instances in one process: cluster {live.cluster_id} is initialised, finalize"
                    " it first",
                    status_code=LLMStatusCode.LLM_FAILED,
                )
            from llm_datadist.init_options import read_init_options

            engine_options, entries, rules = read_init_options(self._role, self._cluster_id, options)
            engine = _open_engine(engine_options)
            if engine_options.cache_manager is None:
                self._manager = KvCacheManager(engine, self._role)
            else:
                # The options of the mode name one device.
                self._manager = CacheManager(cast("Engine", engine), self._cluster_id, engine_options.cache_manager)
            self._engine = engine
            self._rules = rules
            self._pid = os.getpid()
            LLMDataDist.llm_engine_instance = self
            options.update(entries)

    def finalize(self) -> None:
        """Drop all links, caches and keys and stop listening; does nothing if the instance is not initialised.

        No other call of the instance may be running. Afterwards ``init`` may be called again.
        """
        with _life_cycle:
            if not self._is_live():
                return
            engine, manager = self._engine, self._manager
            assert engine is not None
            assert manager is not None
            self._engine = self._manager = None
            LLMDataDist.llm_engine_instance = None
            if isinstance(manager, KvCacheManager):
                manager._close()
            engine.close()

    # ---- links

    def link_clusters(self, clusters: Clusters, timeout: int = 3000) -> LinkResult:
        """Link to remote clusters that listen, each independent of the others.

        KV mode: role DECODER, and the others are PROMPT. Cache-manager mode: any role to any role.

        Parameters
        ----------
        clusters : list or tuple of LLMClusterInfo
            1 to 16 clusters, each with a local and a remote address for every device.
        timeout : int
            Milliseconds for the whole call, int32, > 0.

        Returns
        -------
        overall : LLMStatusCode
            LLM_SUCCESS, or LLM_LINK_FAILED if a cluster is not linked; in cache-manager mode the last result that is
            not LLM_SUCCESS. LLM_PARAM_INVALID: wrong role, no clusters or wrong addresses, too many links;
            LLM_CLUSTER_NUM_EXCEED_LIMIT: too many clusters; LLM_PROCESSING_LINK: another link or unlink call is
            running.
        results : list of LLMStatusCode
            For each cluster, in order: LLM_SUCCESS, LLM_ALREADY_LINK, LLM_REPEAT_REQUEST, LLM_LINK_FAILED or
            LLM_WAIT_PROCESS_TIMEOUT, in cache-manager mode LLM_TIMEOUT. Empty if nothing was tried.

        Raises
        ------
        RuntimeError
            The instance is not initialised.
        TypeError
            An argument of the wrong type, or a cluster without id.
        ValueError
            `timeout` is no int32, or an address in integer form no uint32.
        LLMException
            LLM_PARAM_INVALID: `timeout` is not positive; in cache-manager mode, a cluster without a local address,
            unless ``llm.LocalCommRes`` describes this process.
        """
        engine = self._require_engine()
        check_link_arguments(clusters, timeout)
        return engine.link(cluster_addresses(clusters, self._rules.needs_local_address), timeout)

    def unlink_clusters(self, clusters: Clusters, timeout: int = 3000, force: bool = False) -> LinkResult:
        """Take links down: on a DECODER both sides, on a PROMPT its own side; in cache-manager mode both sides.

        Parameters
        ----------
        clusters : list or tuple of LLMClusterInfo
            1 to 16 clusters, with the addresses that they were linked with; in cache-manager mode the id is enough.
        timeout : int
            Milliseconds for the whole call, int32, > 0.
        force : bool
            Clean the local side only, without asking the peer; both sides must do it.

        Returns
        -------
        overall : LLMStatusCode
            LLM_SUCCESS, or LLM_UNLINK_FAILED if a result is neither LLM_SUCCESS nor LLM_NOT_YET_LINK. Else as in
            `link_clusters`.
        results : list of LLMStatusCode
            For each cluster, in order: LLM_SUCCESS, LLM_NOT_YET_LINK, LLM_REPEAT_REQUEST, LLM_LINK_BUSY,
            LLM_PARAM_INVALID (linked at other addresses), LLM_WAIT_PROCESS_TIMEOUT or LLM_NOTIFY_PROMPT_UNLINK_FAILED
            (both with the local side closed), LLM_UNLINK_FAILED. Empty if nothing was tried. In cache-manager mode a
            cluster that is not linked is LLM_SUCCESS, and a peer that cannot be told LLM_UNLINK_FAILED.

        Raises
        ------
        RuntimeError
            The instance is not initialised.
        TypeError
            An argument of the wrong type, or a cluster without id.
        ValueError
            `timeout` is no int32, or an address in integer form no uint32.
        LLMException
            LLM_PARAM_INVALID: `timeout` is not positive.
        """
        engine = self._require_engine()
        check_link_arguments(clusters, timeout)
        check_isinstance("force", force, bool)
        return engine.unlink(cluster_addresses(clusters), timeout, bool(force))

    def check_link_status(self, remote_cluster_id: int) -> None:
        """Ask the peer of a link for an answer; returns if the link is whole. KV mode, role DECODER.

        Parameters
        ----------
        remote_cluster_id : int
            Remote cluster, uint64.

        Raises
        ------
        RuntimeError
            The instance is not initialised.
        TypeError, ValueError
            The id is no int, or out of range.
        LLMException
            LLM_PARAM_INVALID: wrong role or mode. LLM_NOT_YET_LINK: no link. LLM_LINK_BUSY: the link is in use.
            LLM_WAIT_PROCESS_TIMEOUT: no answer within sync_kv_timeout, or the peer is gone: unlink and link again.
        """
        engine = self._require_engine()
        self._rules.require_kv_mode("check_link_status")
        check_uint64("remote_cluster_id", remote_cluster_id)
        engine.check_link(remote_cluster_id)

    # ---- role

    def switch_role(self, role: LLMRole, switch_options: dict[str, str] | None = None) -> None:
        """Take another role; caches and keys stay as they are.

        A PROMPT stops listening when it becomes something else; keys that are bound then can be pulled again when it is
        PROMPT again. In cache-manager mode the role may stay the same: what changes is where the process listens.

        Parameters
        ----------
        role : LLMRole
            The new role.
        switch_options : dict of str to str, optional
            To become PROMPT: ``llm.listenIpInfo``, one ``ip:port``. In cache-manager mode the same for any role, and
            without it the process stops listening, unless there is a transfer backend. Other entries are ignored, the
            dictionary stays as it is.

        Raises
        ------
        RuntimeError
            The instance is not initialised, or the address cannot be parsed.
        TypeError
            An argument of the wrong type.
        ValueError
            The port is no number, or out of range.
        LLMException
            LLM_PARAM_INVALID: the role does not change, or the address is missing or malformed.
            LLM_FEATURE_NOT_ENABLED: ``enable_switch_role`` was not set at init, which the cache-manager mode does not
            need; or the address would change beside a transfer backend. LLM_EXIST_LINK: links remain.
            LLM_PROCESSING_LINK: a link or unlink call is running. LLM_FAILED: the address cannot be bound. The role is
            the old one then.
        """
        engine = self._require_engine()
        check_isinstance("role", role, LLMRole, allow_none=False)
        if role is engine.role and not self._rules.cache_manager:
            raise InvalidArgument(f"role not changed: it is {role} already")
        check_isinstance("switch_options", switch_options, dict)
        engine.switch_role(role, self._listen_as(role, switch_options))
        self._role = role
        if isinstance(self._manager, KvCacheManager):
            self._manager._take_role(role)

    def _listen_as(self, role: LLMRole, switch_options: dict[str, str] | None) -> tuple[str, int] | None:
        """Tell where the process listens in its new role."""
        from llm_datadist.cluster_info_option import optional_listen, switch_listen

        if self._rules.cache_manager:
            return self._rules.listen_after_switch(optional_listen(switch_options))
        return switch_listen(switch_options) if role is LLMRole.PROMPT else None

    # ---- caches

    @property
    def kv_cache_manager(self) -> KvCacheManager:
        """The caches of an instance in KV mode; the same object until `finalize`.

        Raises
        ------
        RuntimeError
            The instance is not initialised.
        LLMException
            LLM_PARAM_INVALID: it is in cache-manager mode.
        """
        self._require_engine()
        self._rules.require_kv_mode("kv_cache_manager")
        assert isinstance(self._manager, KvCacheManager)
        return self._manager

    @property
    def cache_manager(self) -> CacheManager:
        """The caches of an instance in cache-manager mode; the same object until `finalize`.

        Raises
        ------
        RuntimeError
            The instance is not initialised.
        LLMException
            LLM_PARAM_INVALID: it is in KV mode.
        """
        self._require_engine()
        self._rules.require_cache_manager_mode("cache_manager")
        assert isinstance(self._manager, CacheManager)
        return self._manager

    # ---- inside

    def _is_live(self) -> bool:
        """Whether the instance is initialised; in a forked child that of the parent is not."""
        return self._engine is not None and self._pid == os.getpid()

    def _require_engine(self) -> Engine | SeveralDevices:
        engine = self._engine
        if engine is None or self._pid != os.getpid():
            raise RuntimeError("llm datadist is not initialized")
        return engine

    def _require_communicators(self, function: str) -> Engine:
        engine = self._require_engine()
        self._rules.require_communicators(function)
        return cast("Engine", engine)


def _open_engine(options: EngineOptions) -> Engine | SeveralDevices:
    if len(options.device_ids) > 1:
        from llm_datadist.engine.several_devices import SeveralDevices

        return SeveralDevices(options)
    from llm_datadist.engine.engine import Engine

    return Engine(options)


def _shutdown_handler() -> None:
    """Finalise the initialised instance, if any, when the process ends."""
    instance = LLMDataDist.llm_engine_instance
    if instance is None or not instance._is_live():
        return
    try:
        instance.finalize()
    except LLMException as error:
        _log.warning("finalize at exit: %s", error)


atexit.register(_shutdown_handler)
