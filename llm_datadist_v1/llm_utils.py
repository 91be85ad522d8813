"""Small functions on keys, layers and addresses, under the name that existing programs import."""

from __future__ import annotations

from llm_datadist.cache_keys import is_invalid_id, is_valid_id
from llm_datadist.cluster_info_option import parse_listen_ip_info
from llm_datadist.layer_range import layer_range_to_tensor_indices

__all__ = ["is_invalid_id", "is_valid_id", "layer_range_to_tensor_indices", "parse_listen_ip_info"]
