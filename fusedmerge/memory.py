"""Refuse an allocation that cannot fit before it is begun, with the estimate in the message."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fusedmerge.errors import BankMemoryError

if TYPE_CHECKING:
    import torch

__all__ = ["available_bytes", "require_memory"]


def available_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated on `device`; None where that cannot be told."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "cpu":
        try:
            with open("/proc/meminfo") as lines:
                return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
        except (OSError, StopIteration):
            return None
    return None


def require_memory(nbytes: int, device: torch.device, operation: str, what: str) -> None:
    """Raise BankMemoryError if `nbytes` more do not fit on `device`."""
    available = available_bytes(device)
    if available is not None and nbytes > available:
        raise BankMemoryError(operation, what, f"at most {available / 2**20:,.0f} MiB available on {device}", f"{nbytes / 2**20:,.0f} MiB")
