"""The command ``llm-datadist bench``: how fast this host moves KV caches between two processes."""
