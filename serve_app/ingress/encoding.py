"""JSON out, numbers straight from numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson


def encode(value: Any) -> bytes:
    """JSON of plain objects and arrays; float32 is written with the fewest digits that give it back."""
    if isinstance(value, np.ndarray):
        # orjson takes contiguous arrays only, and rows cut to fewer dimensions are a view.
        value = np.ascontiguousarray(value)
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
