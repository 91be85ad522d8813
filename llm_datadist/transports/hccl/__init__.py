"""HCCL as a transport: bytes go from device to device, over a communicator of two ranks for each link.

A link over HCCL is a link over tcp whose data connections carry requests and answers only. `end` has its two ends,
`making` makes the communicator, and makes it anew when it was lost; `creation_slot` has the rule about that, and
`hccl_device` what all links of a device share.

There are two ways to move the bytes, each with its own kind of communicator: both ends take part, one sends and the
other receives (`two_sided`), or the end that they are meant for copies them (`one_sided`).
"""

NAME = "hccl"
ONE_SIDED = "hccl_one_sided"
