"""What commands print, and the JSON of their results."""

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyro_vae.utils.serialization import replacing, to_plain

__all__ = ["note", "write_json"]


def note(message: str) -> None:
    """Print a line about what is done, to standard error, which leaves standard output to results."""
    print(message, file=sys.stderr)


def write_json(path: Path | None, results: Mapping[str, Any]) -> None:
    """Write results as JSON, null for NaN and infinities; nothing without a path."""
    if path is None:
        return
    plain = to_plain(dict(results), _for_json, "results")
    with replacing(path) as partial:
        partial.write_text(json.dumps(plain, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def _for_json(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else NotImplemented
