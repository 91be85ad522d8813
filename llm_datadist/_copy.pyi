def copy_runs(
    sources: list[int],
    targets: list[int],
    runs: list[tuple[int, int, int]],
    deadline_ns: int,
    *,
    pid: int = 0,
    writing: bool = False,
    threads: int = 1,
) -> int: ...
def enter_workers() -> None: ...
def leave_workers() -> None: ...
