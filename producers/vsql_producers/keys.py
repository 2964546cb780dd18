"""The data key in use: made, announced, counted, rotated, wiped.

Not here: nonces and limits themselves (crypto/dek.py) and wrapping (kms/). Rules:

* An announcement is acknowledged by Kafka before the key seals anything.
* A key belongs to this process and one epoch of it: a new epoch makes a new key.
* Rotated: at the end of its life (per-session: the epoch's; per-batch: each batch; hourly and daily: with the
  first batch after that time), by command, and by force when the next batch would pass its limits.
* vsql_sync.deks says which keys were announced, and how much they sealed; vsql_sync.dek_wrappings under which
  KEK versions they ever lay. Both are written before the key seals. What an order destroyed meanwhile, key or
  version, is not announced.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from vsql_producers.rewrapping import Live, live_keys
from vsql_shared import failpoints, names
from vsql_shared.audit.dsse import KEY_ANNOUNCEMENT, sign_document
from vsql_shared.audit.rows import timestamp
from vsql_shared.crypto.announce import KeyAnnouncement, announce, encode_announcement, rewrap, wrap_again
from vsql_shared.crypto.dek import ALGORITHM, KeyLimits, SealingKey, lifetime_clock
from vsql_shared.errors import KeyUnavailableError, TransientError, UnsealError
from vsql_shared.observe.metrics import RotationReason, StreamMetrics
from vsql_shared.pg import coverage
from vsql_shared.pg.connect import Connection, errors

if TYPE_CHECKING:
    from vsql_producers.seal import Place
    from vsql_shared.config import EncryptionSettings
    from vsql_shared.crypto.signing import Signer
    from vsql_shared.kms.base import KekProvider

_log = logging.getLogger(__name__)

# Seconds a key of these policies seals for at most, and what its end is called.
_LIVES: dict[str, tuple[float, RotationReason]] = {"hourly": (3_600.0, "hour"), "daily": (86_400.0, "day")}


def ended(rotation: str, age: float) -> RotationReason | None:
    """Why a key `age` seconds old seals nothing more, by [encryption.dek] rotation; None: it may go on."""
    seconds, reason = _LIVES.get(rotation, (float("inf"), "session"))
    return reason if age >= seconds else None


class KekRotation(NamedTuple):
    """What came of putting a new KEK version to use."""

    kek_id: str
    rewrapped: tuple[str, ...]
    """Data keys that were announced anew."""
    left: tuple[str, ...]
    """Data keys that stay under an older version: their data is not applied everywhere yet."""
    problem: str
    """Why; '' when none was left."""


class PublishNow(Protocol):
    """Publisher.publish_now."""

    def __call__(self, topic: str, partition: int, key: bytes, value: bytes) -> int:
        """Send one record and wait for its offset."""


class DataKeys:
    """The data keys of one epoch, one at a time."""

    def __init__(
        self,
        settings: EncryptionSettings,
        place: Place,
        provider: KekProvider,
        signer: Signer | None,
        conn: Connection,
        publish: PublishNow,
        metrics: StreamMetrics,
        worker: int,
        *,
        clock: Callable[[], float] = lifetime_clock,
    ) -> None:
        self._settings, self._place = settings, place
        self._provider, self._signer = provider, signer
        self._conn, self._publish = conn, publish
        self._metrics = metrics
        self._worker = worker
        self._clock, self._born = clock, 0.0
        self._key: SealingKey | None = None
        self._saved = (0, 0)
        self._due: RotationReason | None = "session"
        self.kek_id = ""

    @property
    def current(self) -> SealingKey | None:
        """The key that sealed last."""
        return self._key

    def rotate(self, reason: RotationReason) -> None:
        """Use a new key from the next batch on."""
        self._due = self._due or reason

    def key_for(self, tuples: int, nbytes: int) -> SealingKey:
        """The key that seals the next batch; a new one where the present one must not."""
        key = self._key
        if key is not None and (reason := ended(self._settings.dek.rotation, self._clock() - self._born)):
            self.rotate(reason)
        if key is not None and not key.room_for(tuples, nbytes):
            self.rotate("limit")
        if key is None or self._due is not None:
            key = self._renew(self._due or "session")
            if not key.room_for(tuples, nbytes):
                raise KeyUnavailableError(
                    f"one batch of {tuples} records and {nbytes} bytes passes the limits of a new data key",
                    hint="raise encryption.dek.max_tuples and max_bytes, or lower limits.batch_max_rows",
                )
        if self._settings.dek.rotation == "per-batch":
            self._due = "batch"
        return key

    def _renew(self, reason: RotationReason) -> SealingKey:
        place, dek = self._place, self._settings.dek
        limits = KeyLimits(dek.max_tuples, dek.max_bytes)
        key = SealingKey.generate(place.cluster, place.chain, self._worker, limits)
        try:
            self._announce(key)
            self._retire()
        except BaseException:
            # Nobody keeps it: not even `forget` would find it.
            key.wipe()
            raise
        self._key, self._saved, self._due, self._born = key, (0, 0), None, self._clock()
        self._metrics.dek_rotated(reason)
        _log.info("new data key", extra={"dek_id": key.dek_id, "kek_id": self.kek_id, "reason": reason})
        return key

    def _announce(self, key: SealingKey) -> None:
        place = self._place
        said = self._asking(
            "wrap",
            lambda: announce(key, place.cluster, place.chain, place.origin, place.epoch, self._provider),
        )
        self._tell(said)
        self.kek_id = said.kek_id

    def _asking(self, act: Literal["wrap", "unwrap"], ask: Callable[[], KeyAnnouncement]) -> KeyAnnouncement:
        """Ask the KMS, and count that."""
        try:
            said = ask()
        except (KeyUnavailableError, TransientError):
            self._metrics.kms_called(act, ok=False)
            raise
        self._metrics.kms_called(act, ok=True)
        return said

    def _tell(self, said: KeyAnnouncement, *, anew: bool = False) -> None:
        """Note the wrapping, then announce it: whoever destroys keys must know of every wrapping there is.

        `anew`: of a known key. Which announcement was its last is written when Kafka has it: after a crash or
        a failure before that, the command that is given again finds the key under its former version.
        """
        document = sign_document(self._signer, KEY_ANNOUNCEMENT, encode_announcement(said))
        self._note(said, document)
        if anew:
            failpoints.hit("producer.wrapping-noted")
        self._publish(names.keys_topic(said.cluster), 0, said.dek_id.encode(), document)
        if anew:
            with errors("noting an announcement"):
                self._conn.execute(
                    "UPDATE vsql_sync.deks SET kms_provider = %s, kek_id = %s, announcement = %s"
                    " WHERE dek_id = %s",
                    (said.kms_provider, said.kek_id, document, said.dek_id),
                )

    def _note(self, said: KeyAnnouncement, document: bytes) -> None:
        with errors("noting the data key"), self._conn.transaction():
            self._conn.execute(
                "INSERT INTO vsql_sync.deks"
                " (dek_id, chain, epoch, kms_provider, kek_id, algorithm, created_at, announcement)"
                " VALUES (%s, %s, %s, %s, %s, %s, %s, %s) ON CONFLICT DO NOTHING",
                (
                    said.dek_id,
                    said.chain,
                    said.epoch,
                    said.kms_provider,
                    said.kek_id,
                    ALGORITHM,
                    timestamp(said.created_at),
                    document,
                ),
            )
            self._conn.execute(
                "INSERT INTO vsql_sync.dek_wrappings (dek_id, kms_provider, kek_id) VALUES (%s, %s, %s)"
                " ON CONFLICT DO NOTHING",
                (said.dek_id, said.kms_provider, said.kek_id),
            )
            coverage.require_alive(self._conn, said.dek_id, said.kms_provider, said.kek_id)

    def rotate_kek(self) -> KekRotation:
        """Put the KEK's newest version to use, without a pause of the stream.

        1. The next batch has a new data key, wrapped by the newest version.
        2. Data keys whose data is not applied everywhere are wrapped anew and announced again: the one in use
           from memory, former ones by the KMS. Where this identity may not unwrap, they are left, and named.
        """
        newest = self._provider.kek_id
        self.rotate("command")
        rewrapped: list[str] = []
        left: list[str] = []
        problem = ""
        for live in live_keys(self._conn, self._place.chain, self._place.epoch, newest):
            try:
                said = self._asking("unwrap", partial(self._wrapped_anew, live))
                self._tell(said, anew=True)
            except (KeyUnavailableError, UnsealError) as error:
                left.append(live.dek_id)
                problem = problem or str(error)
                continue
            rewrapped.append(said.dek_id)
        _log.info("KEK rotated", extra={"kek_id": newest, "rewrapped": len(rewrapped), "left": len(left)})
        return KekRotation(newest, tuple(rewrapped), tuple(left), problem)

    def _wrapped_anew(self, live: Live) -> KeyAnnouncement:
        key = self._key
        if key is not None and key.dek_id == live.dek_id:
            return wrap_again(live.announcement, key.secret, self._provider)
        return rewrap(live.announcement, self._provider)

    def save_usage(self) -> None:
        """Write how much the key has sealed, where that changed."""
        key = self._key
        if key is None or self._saved == (key.tuples_used, key.bytes_used):
            return
        used = (key.tuples_used, key.bytes_used)
        with errors("counting the data key's use"):
            self._conn.execute(
                "UPDATE vsql_sync.deks SET tuples = %s, bytes = %s WHERE dek_id = %s", (*used, key.dek_id)
            )
        self._saved = used
        self._metrics.dek_used(tuples=used[0], size=used[1])

    def _retire(self) -> None:
        """The key before seals nothing any more: wipe it. What it sealed can still be opened."""
        if self._key is None:
            return
        self.save_usage()
        with errors("retiring the data key"):
            self._conn.execute(
                "UPDATE vsql_sync.deks SET state = 'retired', retired_at = now()"
                " WHERE dek_id = %s AND state <> 'destroyed'",
                (self._key.dek_id,),
            )
        self._key.wipe()
        self._key = None

    def forget(self) -> None:
        """Wipe the key without a word to the database: the epoch is over, however it ended."""
        if self._key is not None:
            self._key.wipe()
            self._key = None

    def close(self) -> None:
        """Retire the key at a graceful stop."""
        self._retire()

    @staticmethod
    def retire_older(conn: Connection, chain: str, epoch: int) -> None:
        """Keys of epochs that ended without a word (a crash) are retired by the next one."""
        with errors("retiring data keys of ended epochs"):
            conn.execute(
                "UPDATE vsql_sync.deks SET state = 'retired', retired_at = now()"
                " WHERE chain = %s AND epoch < %s AND state NOT IN ('retired', 'destroyed')",
                (chain, epoch),
            )
