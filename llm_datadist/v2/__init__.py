"""Module paths of the second generation of the API; every class lives once, in `llm_datadist`."""
