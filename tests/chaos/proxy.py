"""A TCP proxy that can be a bad network: cut, slow, silent, or dead on one side only.

    proxy = Proxy(port, lambda: server.port)     # 127.0.0.1:port leads to 127.0.0.1:server.port
    proxy.cut(); proxy.stall(); proxy.delay(0.2); proxy.half_open("client")
    proxy.heal()

What passes is never looked at. Rules: one thread for each direction of a connection; whatever was done ends
with `heal`, after which the proxy is a plain one again.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from typing import Literal

_CHUNK = 1 << 16
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: what is closed is reset, and nothing is said before

Side = Literal["client", "server"]


class _Link:
    """One connection: the client's socket and the server's, pumped both ways."""

    def __init__(self, proxy: Proxy, client: socket.socket, server: socket.socket) -> None:
        self._ends: dict[Side, socket.socket] = {"client": client, "server": server}
        self._proxy, self.pumps = proxy, 2
        self.held: Side | None = None
        """The end that is kept open and silent although the other one is gone."""
        for source, sink in ((client, server), (server, client)):
            threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(_CHUNK):
                self._proxy.pass_gate()
                sink.sendall(data)
            self._proxy.pass_gate()
        if self.held is None:
            # An end is passed on; what still comes the other way is not waited for.
            for end in self._ends.values():
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
        self._proxy.pump_ended(self)

    def reset(self, keep: Side | None = None) -> None:
        """Reset both ends, or only the one that is not kept."""
        self.held = keep
        for side, end in self._ends.items():
            if side != keep:
                with contextlib.suppress(OSError):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                    end.shutdown(socket.SHUT_RDWR)  # wakes the threads that wait for it
                end.close()

    def close(self) -> None:
        """Both pumps have ended: nothing is left to say."""
        for end in self._ends.values():
            end.close()


class Proxy:
    """Listens from the start; `close` ends it with all connections."""

    def __init__(self, port: int, target: int) -> None:
        self.port, self._target = port, target
        self._lock = threading.Lock()
        self._links: set[_Link] = set()
        self._open = threading.Event()
        self._open.set()
        self._refusing, self._delay = False, 0.0
        self._listener = socket.create_server(("127.0.0.1", port), backlog=100)
        threading.Thread(target=self._listen, name=f"proxy {port}", daemon=True).start()

    def cut(self) -> None:
        """Reset every connection, and every new one at once."""
        self._refusing = True
        self._reset_all()

    def stall(self) -> None:
        """Let nothing pass, and nobody know."""
        self._open.clear()

    def delay(self, seconds: float) -> None:
        """Hold back whatever passes."""
        self._delay = seconds

    def half_open(self, keep: Side) -> None:
        """Reset every connection at one end only: the other never hears of it. New ones work."""
        with self._lock:
            for link in self._links:
                link.reset(keep)

    def heal(self) -> None:
        """End what was begun; ends that were kept open learn now that nobody is there."""
        with self._lock:
            for link in [one for one in self._links if one.held is not None]:
                link.reset()
                self._links.discard(link)
        self._refusing, self._delay = False, 0.0
        self._open.set()

    def close(self) -> None:
        """End it."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._reset_all()
        self._open.set()

    def pass_gate(self) -> None:
        """Wait as long as the network's state wants it."""
        self._open.wait()
        if self._delay:
            time.sleep(self._delay)

    def pump_ended(self, link: _Link) -> None:
        """One direction of a connection has ended; an end that is held open stays until `heal`."""
        with self._lock:
            link.pumps -= 1
            if not link.pumps and link.held is None:
                link.close()
                self._links.discard(link)

    def _reset_all(self) -> None:
        with self._lock:
            for link in self._links:
                link.reset()
            self._links.clear()

    def _listen(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                self._connect(client)

    def _connect(self, client: socket.socket) -> None:
        try:
            if self._refusing:
                raise ConnectionRefusedError
            server = socket.create_connection(("127.0.0.1", self._target), timeout=5)
        except OSError:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            client.close()
            return
        for end in (client, server):
            end.settimeout(None)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._lock:
            self._links.add(_Link(self, client, server))
