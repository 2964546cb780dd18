"""One set of servers for the processes of one test run (`pytest -n 3`).

The run's first process owns the servers: `SharedServers` starts each when a worker first asks for it, and
stops all of them with the run; a worker's `Stack` gets them through a `Borrower`. It is not what keeps
servers between runs (`python -m tests.stack up` does).

Rules: the socket lies in a folder only this user can enter; what a start raised is raised where it was
asked for.
"""

from __future__ import annotations

import contextlib
import threading
from multiprocessing.connection import Client, Connection, Listener

from tests.stack.stack import Kafka, Postgres, Stack


class ServerFailedError(Exception):
    """The run's first process could not start a server; the text is what it said."""


class SharedServers:
    """Servers for the workers of this run; `address` is what they are told."""

    def __init__(self) -> None:
        self._stack = Stack()
        folder = self._stack.base_dir / "shared"
        folder.mkdir(mode=0o700)
        self.address = str(folder / "socket")
        self._listener = Listener(self.address, family="AF_UNIX", backlog=16)
        self._starting = threading.Lock()
        threading.Thread(target=self._serve, name="shared servers", daemon=True).start()

    def close(self) -> None:
        """Stop the servers."""
        self._listener.close()
        self._stack.close()

    def _serve(self) -> None:
        # The listener's close ends this: accepting on a closed socket is an OSError.
        with contextlib.suppress(OSError):
            while True:
                connection = self._listener.accept()
                threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: Connection) -> None:
        with connection:
            version = connection.recv()
            # One after the other: two workers that ask for one server get the same one.
            with self._starting:
                try:
                    answer = self._stack.kafka() if version is None else self._stack.postgres(version)
                except Exception as error:  # noqa: BLE001  # told to the worker, whatever it is
                    connection.send(str(error))
                    return
            connection.send(answer)


class Borrower:
    """A worker's view of them."""

    def __init__(self, address: str) -> None:
        self._address = address

    def kafka(self) -> Kafka:
        """Return the run's Kafka."""
        answer = self._ask(None)
        assert isinstance(answer, Kafka)
        return answer

    def postgres(self, version: int) -> Postgres:
        """Return the run's PostgreSQL of a version."""
        answer = self._ask(version)
        assert isinstance(answer, Postgres)
        return answer

    def _ask(self, version: int | None) -> object:
        with Client(self._address, family="AF_UNIX") as connection:
            connection.send(version)
            answer = connection.recv()
        if isinstance(answer, str):
            raise ServerFailedError(answer)
        return answer
