"""Settings of the process that its threads share."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

__all__ = ["shared"]


def shared(setting: Callable[[], AbstractContextManager[None]]) -> Callable[[], AbstractContextManager[None]]:
    """A context manager that changes something for the whole process: the first thread inside enters it, the last one leaves it."""
    lock = threading.Lock()
    users = 0
    entered = ExitStack()

    @functools.wraps(setting)
    @contextmanager
    def change() -> Iterator[None]:
        nonlocal users
        with lock:
            if users == 0:
                entered.enter_context(setting())
            users += 1
        try:
            yield
        finally:
            with lock:
                users -= 1
                if users == 0:
                    entered.close()

    return change
