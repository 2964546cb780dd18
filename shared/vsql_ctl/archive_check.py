"""What `syncctl audit archive --verify` looks at: every archived segment, from the bucket or from files.

Not here: verifying one segment (vsql_shared/audit/segment.py). Rules:

* A chain's segments are read one behind the other, from its first entry: the first bad one is named, and what
  follows it proves nothing.
* From the bucket, each is the version that was archived; what lies over it, or beside it, is named too, and
  keeps nothing from being read.
* What the chain says was pruned must be there: rows of segments that are gone hide nothing.
* From files nothing but public keys is used: no database, no configuration. Where the first ones were deleted
  after their lock, a base the auditor holds says where the rest begins: its tree is signed, and the entry
  behind it names its hash. What lies before it is not looked at, and that is said.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vsql_shared.audit.chain import EMPTY_HEAD, ChainHead
from vsql_shared.audit.cosigned import cosigners
from vsql_shared.errors import DecodeError, RefusedError, SignatureError, UserError, VerificationError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from vsql_shared.audit.archive import Node, Row
    from vsql_shared.audit.base import Base
    from vsql_shared.audit.checkpoint import Log
    from vsql_shared.audit.segment import Verified
    from vsql_shared.objects.s3 import S3Store, Version

Rows = list[dict[str, Any]]
Problems = list[dict[str, str]]
MAX_HEADER = 1 << 20
"""Bytes of a segment's first lines, which say whose it is."""


@dataclass(slots=True)
class _Seen:
    """What was verified of a chain so far."""

    chain: str
    head: ChainHead = EMPTY_HEAD
    after: int = 0
    """Entries before what is verified, by a base that was given."""
    segments: int = 0
    expired: int = 0
    cosigned: set[str] = field(default_factory=set)
    heads: dict[int, ChainHead] = field(default_factory=dict)
    """The head behind each segment."""

    def begin(self, head: ChainHead) -> None:
        """Begin behind this head: of what lies before nothing is said."""
        self._move(head)
        self.after = head.sequence

    def take(self, verified: Verified) -> None:
        self._move(verified.head)
        self.segments += 1
        self.cosigned |= cosigners(verified.checkpoint)

    def pass_over(self, head: ChainHead) -> None:
        """Take a segment whose time is over."""
        self._move(head)
        self.expired += 1

    def _move(self, head: ChainHead) -> None:
        self.head = self.heads[head.sequence] = head

    def against(self, base: ChainHead) -> str:
        """What is wrong where the chain was pruned at this head; '' when the segments lead there."""
        size = base.sequence
        if self.head.sequence < size:
            return f"chain {self.chain} was pruned up to {size}, the archive has {self.head.sequence} entries"
        if size not in self.heads:
            return f"chain {self.chain} was pruned up to {size}, and no segment ends there"
        # A row of an expired segment has no signed hash: this is where it is held.
        if self.heads[size] != base:
            return f"chain {self.chain} was pruned at another entry {size} than the archive has"
        return ""

    def row(self) -> dict[str, Any]:
        return {
            "chain": self.chain,
            "segments": self.segments,
            "expired": self.expired,
            "after": self.after,
            "last": self.head.sequence,
            "cosigned": sorted(self.cosigned),
        }


def verify_bucket(node: Node, store: S3Store, only: str | None) -> tuple[Rows, Problems]:
    """Every segment this node has archived: by its row, by what was pruned, and by what the bucket lists."""
    from vsql_shared.audit.archive import own_chains, rows_of
    from vsql_shared.audit.segment import folder

    out: Rows = []
    problems: Problems = []
    for chain in own_chains(node, only):
        seen = _Seen(chain)
        rows: list[Row] = []
        wrong: list[str] = []
        try:
            rows = rows_of(node.conn, chain)
            for row in rows:
                _verify_row(node, store, row, seen)
            wrong += _lacking(node, seen)
        except (VerificationError, DecodeError, RefusedError) as error:
            wrong.append(error.message)
        wrong += unlisted(store.versions(folder(node.prefix, node.log(chain))), rows)
        problems += ({"chain": chain, "what": what} for what in wrong)
        out.append(seen.row())
    return out, problems


def _verify_row(node: Node, store: S3Store, row: Row, seen: _Seen) -> None:
    from vsql_shared.audit.archive import expired, needed_until, read_back
    from vsql_shared.audit.base import Base
    from vsql_shared.audit.bases import pinned

    stored = store.look(row.key, row.version)
    if stored is None and expired(node, row):
        # Its time is over, and so it may be gone. What it proved, its signed checkpoint says.
        base = Base(row.head, row.note)
        base.verify(node.log(row.chain), pinned(node.conn))
        if row.place.first != seen.head.sequence + 1 or row.head.sequence != row.place.last:
            raise RefusedError(f"{row.key} is gone, and its row does not follow entry {seen.head.sequence}")
        seen.pass_over(row.head)
        return
    if stored is None or row.bucket != store.bucket:
        raise RefusedError(f"{row.key} is missing: it is not in bucket {store.bucket}")
    verified, digest, _ = read_back(node, store, node.log(row.chain), stored, row.place, seen.head)
    if digest != row.sha256:
        raise RefusedError(f"{row.key} is another one than was archived: other SHA-256")
    store.require_locked(stored, needed_until(node, verified))
    seen.take(verified)


def _lacking(node: Node, seen: _Seen) -> list[str]:
    """What the chain says was pruned, and what its rows lack, is in the archive: that head, and no other."""
    from vsql_shared.audit.bases import base_of, said_base

    log = node.log(seen.chain)
    found = (said_base(node.conn, node.trust, log), base_of(node.conn, log))
    return [what for base in found if base is not None and (what := seen.against(base.head))][:1]


def unlisted(listed: Iterable[Version], rows: Iterable[Row]) -> list[str]:
    """What the bucket lists under a chain's prefix and was not archived: over it, or beside it."""
    mine = {(row.key, row.version) for row in rows}
    versions = dict(mine)
    out = []
    for one in listed:
        if (one.key, one.version) in mine:
            continue
        if one.key in versions:
            what = "a mark of its deletion" if one.deleted else "another version"
            out.append(f"{what} lies over {one.key}, whose archived version is {versions[one.key]}")
        else:
            out.append(
                f"{one.key} is in the archive, and this node has not noted it: it was added, or a crash came"
                " between storing and noting it (`syncctl audit archive` takes it up if it verifies)"
            )
    return out


def verify_folder(
    folder: Path, keys: tuple[Path, ...], others: tuple[str, ...], after: tuple[Path, ...] = ()
) -> tuple[Rows, Problems]:
    """Downloaded segments, with public keys alone. Chains are told apart by what the files say.

    `after`: files with a base each, behind which the segments of its chain begin.
    """
    from vsql_shared.audit.segment import SUFFIX
    from vsql_shared.crypto.signing import load_public_key

    writers = [load_public_key(path) for path in keys]
    known = [(node, load_public_key(Path(path))) for node, path in map(_pair, others)]
    found: dict[Log, list[Path]] = {}
    problems: Problems = []
    for path in sorted(folder.rglob(f"*{SUFFIX}"), key=lambda one: one.name):
        try:
            found.setdefault(_log_of(path), []).append(path)
        except (DecodeError, VerificationError) as error:
            problems.append({"chain": "", "what": f"{path.relative_to(folder)}: {error.message}"})
    if not found and not problems:
        raise UserError(f"there is no segment (*{SUFFIX}) in {folder}")
    bases = _bases(after, found)
    out: Rows = []
    for log, paths in sorted(found.items()):
        seen = _Seen(log.chain)
        wrong = _verify_files(folder, paths, log, seen, _Keys(writers, known), bases.get(log))
        problems += ({"chain": log.chain, "what": what} for what in wrong)
        out.append(seen.row())
    return out, problems


class _Keys(NamedTuple):
    """Who is believed off-line: writers' keys, whichever chain it is, and nodes that cosigned."""

    writers: list[bytes]
    others: list[tuple[str, bytes]]


def _verify_files(
    folder: Path, paths: list[Path], log: Log, seen: _Seen, keys: _Keys, given: tuple[Path, Base] | None
) -> Iterator[str]:
    """What is wrong with the files of one chain: the first that does not verify."""
    from vsql_shared.audit.segment import lines, parse_name, verify
    from vsql_shared.crypto.signing import PinnedKey, TrustStore, fingerprint

    trust = TrustStore(PinnedKey(log.writer, key, fingerprint(key), revoked=False) for key in keys.writers)
    believed = [*((log.writer, key) for key in keys.writers), *keys.others]
    path = given[0] if given else folder
    try:
        if given:
            given[1].verify(log, believed, cosigned=bool(keys.others))
            seen.begin(given[1].head)
        for path in paths:
            place = parse_name(path.name)
            if place.last <= seen.after:
                continue
            with path.open("rb") as file:
                verified = verify(
                    lines(file.read), log, place, seen.head, trust, believed, cosigned=bool(keys.others)
                )
            seen.take(verified)
    except (DecodeError, VerificationError) as error:
        inside = path.is_relative_to(folder)
        what = f"{path.relative_to(folder) if inside else path}: {error.message}"
        if isinstance(error, SignatureError):
            what += f" (keys given with --key: {', '.join(map(fingerprint, keys.writers))})"
        yield what


def _bases(paths: tuple[Path, ...], found: Iterable[Log]) -> dict[Log, tuple[Path, Base]]:
    """The base in each file, by its chain; believed once it verifies. Raises UserError."""
    from vsql_ctl.trail import read_text
    from vsql_shared.audit.base import Base
    from vsql_shared.audit.checkpoint import Checkpoint
    from vsql_shared.audit.notes import SignedNote

    out: dict[Log, tuple[Path, Base]] = {}
    for path in paths:
        try:
            base = Base.decode(read_text(path, MAX_HEADER).strip())
            log = Checkpoint.parse(SignedNote.decode(base.note).text).log
        except DecodeError as error:
            raise UserError(
                f"{path}: {error.message}",
                hint="--after takes a base as `retention.json` of an evidence bundle has it (pruned, base)",
            ) from error
        if log not in found:
            raise UserError(f"{path} is of chain {log.chain}, of which there is no segment")
        if log in out:
            raise UserError(f"{out[log][0]} and {path} are both of chain {log.chain}: give one of them")
        out[log] = (path, base)
    return out


def _pair(value: str) -> tuple[str, str]:
    node, mark, path = value.partition("=")
    if not mark or not node:
        raise UserError(f"--cosigner {value!r}", hint="write NODE=FILE, for example node-b=node-b.pub")
    return node, path


def _log_of(path: Path) -> Log:
    """Whose segment a file says it is: its first entry's chain. Believed once its signatures verify."""
    from vsql_shared.audit.segment import log_of

    def heads() -> Iterator[bytes]:
        with path.open("rb") as file:
            for _ in range(2):
                yield file.readline(MAX_HEADER * 8)

    return log_of(heads())
