"""What people run: the command ``llm-datadist``; installed as ``llm_datadist.tools``."""
