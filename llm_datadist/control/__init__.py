"""What processes say to each other besides moving bytes: handshake, unlink, probe.

ZeroMQ carries the messages, msgpack encodes them.
"""
