"""A process is asked to end: SIGTERM and SIGINT set an event. Not here: what ends, and in which order."""

from __future__ import annotations

import _thread
import signal
import threading


def set_on_signals(stop: threading.Event) -> None:
    """Have SIGTERM and SIGINT set `stop`; to be called in the main thread.

    Another thread sets it: a handler runs in the main thread, and where that is inside `stop.wait` it holds
    the event's lock, for which the handler would wait for ever.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: _thread.start_new_thread(stop.set, ()))
