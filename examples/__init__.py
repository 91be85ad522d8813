"""Programs a user would write; installed as ``llm_datadist.examples``."""
