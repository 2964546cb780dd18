"""The data key in use: made, announced, counted, rotated, wiped.

Not here: nonces and limits themselves (crypto/dek.py) and wrapping (kms/). Rules:

* An announcement is acknowledged by Kafka before the key seals anything.
* A key belongs to this process and one epoch of it: a new epoch makes a new key.
* Rotated: at the end of its life (per-session: the epoch's; per-batch: each batch), by command, and by force
  when the next batch would pass its limits.
* vsql_sync.deks says which keys were announced, and how much they sealed.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Protocol

from vsql_shared import names
from vsql_shared.audit.dsse import KEY_ANNOUNCEMENT, sign_document
from vsql_shared.audit.rows import timestamp
from vsql_shared.crypto.announce import announce, encode_announcement
from vsql_shared.crypto.dek import ALGORITHM, KeyLimits, SealingKey
from vsql_shared.errors import KeyUnavailableError, TransientError
from vsql_shared.observe.metrics import RotationReason, StreamMetrics
from vsql_shared.pg.connect import Connection, errors

if TYPE_CHECKING:
    from vsql_producers.seal import Place
    from vsql_shared.config import EncryptionSettings
    from vsql_shared.crypto.signing import Signer
    from vsql_shared.kms.base import KekProvider

_log = logging.getLogger(__name__)


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
    ) -> None:
        self._settings, self._place = settings, place
        self._provider, self._signer = provider, signer
        self._conn, self._publish = conn, publish
        self._metrics = metrics
        self._worker = worker
        self._key: SealingKey | None = None
        self._saved = (0, 0)
        self._due: RotationReason | None = "session"
        self.kek_id = self._kms = ""

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
            self._note(key)
        except BaseException:
            # Nobody keeps it: not even `forget` would find it.
            key.wipe()
            raise
        self._key, self._saved, self._due = key, (0, 0), None
        self._metrics.dek_rotated(reason)
        _log.info("new data key", extra={"dek_id": key.dek_id, "kek_id": self.kek_id, "reason": reason})
        return key

    def _announce(self, key: SealingKey) -> None:
        place = self._place
        try:
            said = announce(key, place.cluster, place.chain, place.origin, place.epoch, self._provider)
        except (KeyUnavailableError, TransientError):
            self._metrics.kms_called("wrap", ok=False)
            raise
        self._metrics.kms_called("wrap", ok=True)
        document = sign_document(self._signer, KEY_ANNOUNCEMENT, encode_announcement(said))
        self._publish(names.keys_topic(place.cluster), 0, key.dek_id.encode(), document)
        self.kek_id, self._kms = said.kek_id, said.kms_provider

    def _note(self, key: SealingKey) -> None:
        place = self._place
        with errors("noting the data key"):
            self._conn.execute(
                "INSERT INTO vsql_sync.deks"
                " (dek_id, chain, epoch, kms_provider, kek_id, algorithm, created_at)"
                " VALUES (%s, %s, %s, %s, %s, %s, %s)",
                (
                    key.dek_id,
                    place.chain,
                    place.epoch,
                    self._kms,
                    self.kek_id,
                    ALGORITHM,
                    timestamp(key.created_at),
                ),
            )

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
                "UPDATE vsql_sync.deks SET state = 'retired', retired_at = now() WHERE dek_id = %s",
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
                " WHERE chain = %s AND epoch < %s AND state <> 'retired'",
                (chain, epoch),
            )
