"""Who takes part in a cluster of prefill and decode processes; installed as ``llm_datadist.cluster``."""
