"""Downloads come from a repository that answers over HTTP; what is not the pinned file is never used."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.stack.fetch import FetchError, copy_files, unpack_group
from tests.stack.lock import Artifact

CONTENT = b"the file that was pinned"
PINNED = Artifact("tool", None, hashlib.sha256(CONTENT).hexdigest(), "maven", "org.example:tool:1.0")
Requests = list[str]


class _Repository(SimpleHTTPRequestHandler):
    """A Maven repository in a folder, which counts what it is asked for."""

    def __init__(self, asked: Requests, folder: Path, *rest: object) -> None:
        self.asked = asked
        super().__init__(*rest, directory=str(folder))  # type: ignore[arg-type]  # what the server hands over

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  (its name there)
        self.asked.append(format % args)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, Requests]]:
    """The one file of a repository that MAVEN_REPO_URL points at, and the requests made to it."""
    folder = tmp_path / "repository"
    file = folder / PINNED.maven_path
    file.parent.mkdir(parents=True)
    file.write_bytes(CONTENT)
    asked: Requests = []
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Repository, asked, folder)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("MAVEN_REPO_URL", f"http://127.0.0.1:{server.server_port}/")
        yield file, asked
        server.shutdown()
        thread.join()


def _fetch(cache: Path) -> Path:
    return unpack_group("tool", [PINNED], copy_files, cache)


def test_a_pinned_file_is_fetched_once(repository: tuple[Path, Requests], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    assert (_fetch(cache) / "tool-1.0.jar").read_bytes() == CONTENT
    _fetch(cache)
    assert len(repository[1]) == 1


def test_two_at_once_fetch_once(repository: tuple[Path, Requests], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(_fetch, [cache] * 4))
    assert len(folders) == 1
    assert len(repository[1]) == 1


def test_a_changed_file_is_refused_and_leaves_nothing(
    repository: tuple[Path, Requests], tmp_path: Path
) -> None:
    repository[0].write_bytes(CONTENT + b" and a little more")
    cache = tmp_path / "cache"
    cache.mkdir()
    with pytest.raises(FetchError, match=r"org\.example:tool:1\.0: SHA-256 is .*, pinned is"):
        _fetch(cache)
    assert [path.name for path in cache.iterdir()] == [".tool.lock"]


def test_a_missing_file_is_named_with_what_to_do(repository: tuple[Path, Requests], tmp_path: Path) -> None:
    repository[0].unlink()
    with pytest.raises(FetchError, match=r"org\.example:tool:1\.0 could not be downloaded.*MAVEN_REPO_URL"):
        _fetch(tmp_path)
