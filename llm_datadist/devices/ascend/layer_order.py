"""Lets a layer-wise transfer begin when the device has computed the layer, whatever its synchronizer waits for.

A synchronizer may wait on the host, or only tell a stream to wait: `event.wait()` of torch_npu does the latter, to the
stream that is current in the calling thread, and returns at once. So it is called with a stream of ours as the current
one; an event that is recorded on that stream afterwards happens when everything has that it was told to wait for. The
event is one of torch_npu, not of the runtime: torch_npu hands its work to a queue that another thread empties, and what
was never recorded looks complete to the runtime.

Without torch_npu in the process there is only one thing to do: the device is current in the thread that calls.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from llm_datadist._acl import Device
from llm_datadist.devices.base import SynchronizeLayer

_POLL_SECONDS = 0.00002  # about what a launch costs: shorter waits would only keep a core busy


class LayerOrder:
    """Wraps the synchronizers of one device.

    Parameters
    ----------
    device : Device
        That computes the layers.
    timeout_s : float
        How long what a synchronizer has ordered may take after it returned, in seconds.
    """

    def __init__(self, device: Device, timeout_s: float) -> None:
        self._device = device
        self._timeout_s = timeout_s
        self._stream: Any = None  # of torch_npu; one for all transfers, which only wait on it

    def wrap(self, synchronize_layer: SynchronizeLayer) -> SynchronizeLayer:
        """Give a synchronizer that returns True only when the bytes of the layer are there.

        It raises TimeoutError if they are not there in time, and what `synchronize_layer` raises.
        """

        def synchronize(layer: int, timeout_in_millis: None) -> object:
            with self._device.current():
                npu = _npu()
                if npu is None:
                    return synchronize_layer(layer, timeout_in_millis)
                return self._in_stream(npu, layer, timeout_in_millis, synchronize_layer)

        return synchronize

    def _in_stream(self, npu: Any, layer: int, timeout_in_millis: None, synchronize_layer: SynchronizeLayer) -> bool:
        npu.set_device(self._device.device_id)
        if self._stream is None:
            self._stream = npu.Stream(self._device.device_id)
        with npu.stream(self._stream):
            if not synchronize_layer(layer, timeout_in_millis):
                return False
        event = npu.Event()
        event.record(self._stream)
        give_up = time.monotonic() + self._timeout_s
        while not event.query():
            if time.monotonic() >= give_up:
                raise TimeoutError(f"layer {layer} was not computed {self._timeout_s:g} s after its synchronizer")
            time.sleep(_POLL_SECONDS)
        return True


def _npu() -> Any:
    """Give ``torch.npu`` if the program has imported torch_npu."""
    return sys.modules["torch"].npu if "torch_npu" in sys.modules and "torch" in sys.modules else None
