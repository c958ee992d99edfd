"""The compiled extension; documented in python/bindings.cpp."""

import numpy as np
from numpy.typing import NDArray

def isas() -> list[str]: ...
def isa() -> str: ...
def merge_cpu(
    segments: NDArray[np.int64],
    experts: NDArray[np.int64],
    coefficients: NDArray[np.float64],
    threads: int,
    *,
    isa: str = "",
    done: NDArray[np.int64] | None = None,
) -> None: ...
