"""The demo with its workers as services of a network: they announce themselves at a registry, and a driver finds them.

A driver sends the prompts to prompt services, tells decoder services what to pull, and collects the answers. The KV
caches go straight from a prompt to a decoder through `llm_datadist`. A request whose services die begins again with
others.
"""
