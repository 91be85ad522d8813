"""``llm-datadist check``: does moving caches work on this machine? The first command on new hardware.

The command itself touches no device. Two processes do, on one device each; they are told what to do step by step, every
step with a deadline, at which they are killed: calls into a driver may hang and cannot be interrupted.
"""
