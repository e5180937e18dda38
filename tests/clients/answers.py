"""What a client's answers are compared with: the same asked in plain HTTP."""

from __future__ import annotations

from typing import Any

import httpx
import numpy as np
import numpy.typing as npt

TEXTS = ["What is Deep Learning?", "naïve café ☕ 你好", "A replica that was lost is made anew. " * 12]


def plain(base_url: str, inputs: Any, **options: Any) -> npt.NDArray[np.float32]:
    """`POST /embed`, (n, d)."""
    answer = httpx.post(f"{base_url}/embed", json={"inputs": inputs, **options}, timeout=60)
    assert answer.status_code == 200, answer.text
    return np.array(answer.json(), np.float32)


def assert_same(got: Any, expected: npt.NDArray[np.float32]) -> None:
    """Equal but for the last digits, which depend on what a text was batched with."""
    np.testing.assert_allclose(np.array(got, np.float32), expected, atol=2e-5)
