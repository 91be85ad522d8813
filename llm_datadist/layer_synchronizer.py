"""How a program tells a layer-wise transfer that the model has computed a layer."""

from __future__ import annotations

from abc import ABC, abstractmethod


class LayerSynchronizer(ABC):
    """Base class of what `KvCacheManager.transfer_cache_async` asks before it sends a layer.

    Examples
    --------
    >>> import threading
    >>> from llm_datadist import LayerSynchronizer
    >>> class ComputedLayers(LayerSynchronizer):
    ...     events = [threading.Event() for _ in range(2)]  # set by the model
    ...     def synchronize_layer(self, layer_index, timeout_in_millis):
    ...         return self.events[layer_index].wait(timeout=1)
    >>> ComputedLayers.events[0].set()
    >>> ComputedLayers().synchronize_layer(0, None)
    True
    """

    @abstractmethod
    def synchronize_layer(self, layer_index: int, timeout_in_millis: int | None) -> bool:
        """Block until the layer's keys and values are in the cache; called in the thread of the transfer.

        Parameters
        ----------
        layer_index : int
            Layer of the source cache. Layers come in ascending order, once each, and only those that are sent.
        timeout_in_millis : int or None
            Always None; reserved.

        Returns
        -------
        bool
            True: the layer can be sent. False: it failed, which ends the transfer with LLM_PARAM_INVALID for the
            configs that want this layer. An exception ends it with LLM_FAILED for them, and is logged.
        """
