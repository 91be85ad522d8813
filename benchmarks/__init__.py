"""How fast KV caches travel, beside the limits of the machine. Run ``python -m benchmarks``; no test depends on it."""
