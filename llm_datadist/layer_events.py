"""A layer synchronizer for models that compute on streams of a device, through events of torch, or on the host.

The thread of the model says `record` behind each layer; the thread of a transfer waits until the device has come to
that point. No wait is unbounded: an event is polled (``query``), since ``synchronize`` of torch has no timeout. An
event that was never recorded says of itself that it is complete; so what counts is first of all that `record` was
called, and an event is only asked after that. Handles of events are never looked at behind torch's back: torch_npu
passes a record on in another thread, and the raw event is complete until then.

This module is an addition to the documented interface, and needs no torch.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from llm_datadist.arguments import UINT32_MAX, check_isinstance
from llm_datadist.layer_synchronizer import LayerSynchronizer

__all__ = ["LayerEvents", "StreamEvent"]

_log = logging.getLogger("llm_datadist.transfer")

# Between two looks at an event: as short as a layer may take at first, then long enough to leave the processor alone.
_FIRST_PAUSE_S = 50e-6
_LONGEST_PAUSE_S = 1e-3


class StreamEvent(Protocol):
    """What is asked of an event: torch.npu.Event and torch.cuda.Event have it."""

    def record(self, *stream: Any) -> Any:
        """Mark the end of what the stream was given so far; without an argument: the current stream of the thread."""

    def query(self) -> bool:
        """Tell whether the stream has come there."""


class LayerEvents(LayerSynchronizer):
    """Which layers of a model are computed; `KvCacheManager.transfer_cache_async` waits for them.

    One object serves one pass of the model at a time, and any number of transfers of that pass. All methods may be
    called from any thread.

    Parameters
    ----------
    num_layers : int
        Layers of the model, > 0.
    make_event : callable, optional
        Makes an event that has not been recorded: ``torch.npu.Event`` or ``torch.cuda.Event``. Without it a layer is
        computed when `record` is called, as is right for models on the CPU.
    timeout_in_millis : int
        How long a transfer waits for one layer, > 0, unless it says so itself.

    Raises
    ------
    TypeError
        An argument of the wrong type.
    ValueError
        A number is out of range.

    Examples
    --------
    ::

        layers = LayerEvents(num_layers, torch.npu.Event)
        task = manager.transfer_cache_async(cache, layers, configs)
        try:
            for index, layer in enumerate(model.layers):
                hidden = layer(hidden)
                layers.record(index)
        except Exception as error:
            layers.fail(error)
            raise
        task.synchronize(5000)
        layers.reset()
    """

    def __init__(
        self, num_layers: int, make_event: Callable[[], StreamEvent] | None = None, *, timeout_in_millis: int = 10_000
    ) -> None:
        self._num_layers = _check_positive("num_layers", num_layers)
        self._default_timeout = _check_positive("timeout_in_millis", timeout_in_millis)
        if make_event is not None and not callable(make_event):
            raise TypeError(f"make_event only support a callable, but got {make_event!r}")
        self._make_event = make_event
        self._changed = threading.Condition()  # never held while an event is recorded or asked
        self._pass = 0  # tells a pass of the model from the next one
        self._recorded: dict[int, StreamEvent | None] = {}  # None: computed already
        self._failure: str | None = None

    # ---- for the model

    def record(self, layer_index: int, stream: Any = None) -> None:
        """Say that the work of a layer has been given to a stream, or without events: that it is done.

        Parameters
        ----------
        layer_index : int
            In ``[0, num_layers)``, once in a pass.
        stream : torch.npu.Stream or torch.cuda.Stream, optional
            Where the layer computes; the current stream of this thread if it is not given.

        Raises
        ------
        ValueError
            There is no such layer.
        RuntimeError
            It was recorded before in this pass.
        """
        self._check_layer(layer_index)
        with self._changed:
            current = self._pass
        event = None
        if self._make_event is not None:
            event = self._make_event()
            event.record(*(() if stream is None else (stream,)))
        with self._changed:
            if self._pass != current:
                return  # the pass that the layer belonged to is over
            if layer_index in self._recorded:
                raise RuntimeError(f"layer {layer_index} is recorded already, call reset() before the next pass")
            self._recorded[layer_index] = event
            self._changed.notify_all()

    def fail(self, error: BaseException | str) -> None:
        """Say that the model failed: transfers end with LLM_FAILED, also for layers that were recorded.

        Parameters
        ----------
        error : BaseException or str
            Why, for the log. The first one of a pass counts.
        """
        check_isinstance("error", error, [BaseException, str], allow_none=False)
        # As text: an exception would keep alive what the frames of the model refer to.
        text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        with self._changed:
            if self._failure is None:
                self._failure = text
            self._changed.notify_all()

    def reset(self) -> None:
        """Begin the next pass: no layer is recorded, nothing has failed.

        Call it when the transfers of the last pass have ended. One that still waits ends with LLM_PARAM_INVALID; one
        that asks for a further layer afterwards would wait for that of the new pass.
        """
        with self._changed:
            self._pass += 1
            self._recorded.clear()
            self._failure = None
            self._changed.notify_all()

    # ---- for the transfer

    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        """Wait until a layer is computed; see `LayerSynchronizer`.

        Parameters
        ----------
        layer_index : int
            In ``[0, num_layers)``.
        timeout_in_millis : int or None
            How long at most; None: what the constructor says.

        Returns
        -------
        bool
            False: not in time, or the pass is over.

        Raises
        ------
        ValueError
            There is no such layer.
        RuntimeError
            The model failed.
        """
        self._check_layer(layer_index)
        timeout = self._default_timeout if timeout_in_millis is None else timeout_in_millis
        deadline = time.monotonic() + timeout / 1000
        with self._changed:
            current = self._pass
            self._changed.wait_for(
                lambda: layer_index in self._recorded or self._is_over(current), deadline - time.monotonic()
            )
            if self._is_over(current):
                return False
            if layer_index not in self._recorded:
                _log.warning("layer %d was not recorded within %d ms", layer_index, timeout)
                return False
            event = self._recorded[layer_index]
        pause = _FIRST_PAUSE_S
        while event is not None and not event.query():
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                _log.warning("layer %d was recorded, but not computed within %d ms", layer_index, timeout)
                return False
            with self._changed:
                if self._is_over(current):
                    return False
                self._changed.wait(min(pause, remaining))
            pause = min(2 * pause, _LONGEST_PAUSE_S)
        with self._changed:
            return not self._is_over(current)

    def _is_over(self, current: int) -> bool:
        """Tell whether a pass has been reset; raise what the model failed with. The lock is held."""
        if self._pass != current:
            return True
        if self._failure is not None:
            raise RuntimeError(f"the model failed: {self._failure}")
        return False

    def _check_layer(self, layer_index: int) -> None:
        check_isinstance("layer_index", layer_index, int, allow_none=False)
        if not 0 <= layer_index < self._num_layers:
            raise ValueError(f"layer_index {layer_index} is out of range, should be in [0, {self._num_layers})")


def _check_positive(name: str, value: int) -> int:
    check_isinstance(name, value, int, allow_none=False)
    if not 0 < value <= UINT32_MAX:
        raise ValueError(f"{name} is {value}, should be in [1, {UINT32_MAX}]")
    return value
