"""A server that answers with the bytes a test gives it, well or not: what a stranger may send to a client."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

Speak = Callable[[socket.socket], None]


@contextmanager
def speaking(speak: Speak, tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """A server that reads a request and then does as it is told; its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=_serve, args=(listener, speak, tls), daemon=True)
        thread.start()
        yield f"http{'s' if tls else ''}://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)


def _serve(listener: socket.socket, speak: Speak, tls: ssl.SSLContext | None) -> None:
    with suppress(OSError):
        while True:
            came, _ = listener.accept()
            with suppress(OSError), tls.wrap_socket(came, server_side=True) if tls else came as conn:
                conn.recv(1 << 16)
                speak(conn)


def drip(conn: socket.socket, first: bytes) -> None:
    """Send this, and then a byte now and then, without end."""
    conn.sendall(first)
    while True:
        time.sleep(0.2)
        conn.sendall(b"x")
