"""``llm-datadist demo``: a language model answers across two processes.

One process prefills the prompts, another decodes the answers, and the KV cache travels from the first to the second
through `llm_datadist`. A third process, alone with the model, then checks that the answers are the same, token for
token.
"""
