import sys

if sys.version_info >= (3, 12):
    from collections.abc import Buffer
else:
    from typing_extensions import Buffer
if sys.version_info >= (3, 13):
    from types import CapsuleType
else:
    from typing_extensions import CapsuleType

INT: int
UINT: int
FLOAT: int
BFLOAT: int
BOOL: int
CPU_DEVICE: tuple[int, int]

def make_capsule(
    memory: Buffer,
    owner: object,
    type_code: int,
    type_bits: int,
    shape: tuple[int, ...],
    *,
    versioned: bool,
    copied: bool,
) -> CapsuleType: ...
