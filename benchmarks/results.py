"""Result files: what was measured, when, and on which machine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .machine import describe_machine
from .measurement import Row

FOLDER = Path(__file__).with_name("results")


def as_document(rows: Sequence[Row], peers: Sequence[str] = ()) -> dict[str, Any]:
    """Put rows into a document that JSON can hold."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "peers": list(peers),
        "rows": [row.as_dict() for row in rows],
    }


def save(document: dict[str, Any], path: Path | None = None) -> Path:
    """Write a document, by default into the folder of results under its date; gives the path."""
    if path is None:
        FOLDER.mkdir(exist_ok=True)
        path = FOLDER / f"{document['date'][:10]}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path
