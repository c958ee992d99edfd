"""Typed errors. Each says the operation, the field, what was expected and what was got.

Every error is a `FusedMergeError` and also the builtin that fits (`ValueError`, `TypeError`, `KeyError`, ...), so that callers may
catch either. A call that raises one has changed nothing.
"""

from __future__ import annotations

__all__ = [
    "BackendError",
    "BankMemoryError",
    "DeviceError",
    "DtypeError",
    "FormatError",
    "FusedMergeError",
    "InvalidTypeError",
    "InvalidValueError",
    "MissingFileError",
    "ShapeError",
    "StateError",
    "UnknownNameError",
]


class FusedMergeError(Exception):
    """Base of all errors: `operation: field: expected ..., got ...`."""

    def __init__(self, operation: str, field: str, expected: object, got: object) -> None:
        super().__init__(operation, field, expected, got)
        self.operation = operation
        self.field = field
        self.expected = expected
        self.got = got

    def __str__(self) -> str:
        return f"{self.operation}: {self.field}: expected {self.expected}, got {self.got}"


class InvalidValueError(FusedMergeError, ValueError):
    """An argument of the right type with a value that cannot be used."""


class InvalidTypeError(FusedMergeError, TypeError):
    """An argument of the wrong type."""


class UnknownNameError(FusedMergeError, KeyError):
    """An adapter or a target that is not there."""


class ShapeError(InvalidValueError):
    """A tensor of the wrong shape or layout."""


class DeviceError(InvalidValueError):
    """A tensor on the wrong device."""


class DtypeError(InvalidTypeError):
    """A tensor of the wrong dtype."""


class FormatError(InvalidValueError):
    """A file that is damaged, or that would merge silently wrong."""


class MissingFileError(FusedMergeError, FileNotFoundError):
    """A file or directory that is not there."""


class StateError(FusedMergeError, RuntimeError):
    """A call that does not fit the present state: closed, shared weights in use, storage moved."""


class BankMemoryError(FusedMergeError, MemoryError):
    """A bank, a base copy or a workspace that does not fit; the message holds the estimate."""


class BackendError(FusedMergeError, RuntimeError):
    """A backend that cannot be used here; the message says why."""
