"""Faults that the loopback Hub injects on request, so that a client can be seen to survive them."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass
class Fault:
    """What goes wrong with the requests that match.

    Args:
        path (str): regular expression searched in the request's path and query.
        times (int | None): number of requests it befalls; None: all.
        method (str | None): only this method.
        status (int | None): answer with this status and ``body`` instead of the real answer.
        headers (Mapping[str, str]): headers added to the answer.
        body (bytes): body sent with ``status``.
        truncate (int | None): send so many bytes of the body, then close the connection.
        flip (int | None): invert the byte at this offset of the body.
        delay (float): seconds to wait before anything is sent.
        stall (float): seconds to wait in the middle of the body.
        reset (bool): reset the connection instead of answering.
    """

    path: str
    times: int | None = None
    method: str | None = None
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    truncate: int | None = None
    flip: int | None = None
    delay: float = 0.0
    stall: float = 0.0
    reset: bool = False

    def befalls(self, method: str, path: str) -> bool:
        """Whether it applies to a request, not counting ``times``."""
        return (self.method in (None, method)) and re.search(self.path, path) is not None


class FaultPlan:
    """The faults in force, the first match wins; used from many request threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._faults: list[Fault] = []

    def add(self, fault: Fault) -> None:
        """Put a fault in force, after those that are already."""
        with self._lock:
            self._faults.append(fault)

    def clear(self) -> None:
        """Lift all faults."""
        with self._lock:
            self._faults.clear()

    def take(self, method: str, path: str) -> Fault | None:
        """The fault that befalls a request; counts it."""
        with self._lock:
            for fault in self._faults:
                if fault.times != 0 and fault.befalls(method, path):
                    if fault.times is not None:
                        fault.times -= 1
                    return fault
        return None
