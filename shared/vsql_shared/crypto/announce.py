"""Announcements of data keys: what lies, signed, on the keys topic, and the consumer's ring of opened keys.

Not here: the signature around an announcement (audit/ documents) and Kafka. Rules:

* An announcement is the Avro record of schemas/avro/key_announcement.avsc in its one canonical encoding;
  other encodings of the same content are refused, so that equal keys have equal bytes.
* Its commitment must be that of the unwrapped key, or nothing is opened (OpeningKey checks).
* A key may be announced again when another KEK version wraps it: then only its wrapping differs (`same_key`),
  and the later announcement counts.
* The ring holds a bounded number of keys for a bounded time, so that a destroyed KEK version stops
  opening old data soon, and memory holds few keys.
"""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import fastavro

from vsql_shared.crypto.dek import ALGORITHM, OpeningKey, SealingKey, key_context, lifetime_clock
from vsql_shared.crypto.signing import Signed
from vsql_shared.errors import DecodeError, KeyUnavailableError, UnsealError
from vsql_shared.kms.base import KekProvider
from vsql_shared.wire.pack import schema

FORMAT = 1
MEDIA_TYPE = "application/vnd.vsql-sync.key-announcement.v1+avro"
_MAX_LONG, _MIN_LONG = (1 << 63) - 1, -(1 << 63)


@dataclass(frozen=True, slots=True)
class KeyAnnouncement:
    """A data key as its producer announces it; field by field the Avro record without `format`."""

    cluster: str
    chain: str
    origin: str
    dek_id: str
    epoch: int
    kms_provider: str
    kek_id: str
    wrap_algorithm: str
    algorithm: str
    wrapped_dek: bytes
    commitment: bytes
    worker: int
    created_at: int


def encode_announcement(announcement: KeyAnnouncement) -> bytes:
    """The payload to sign and send."""
    out = io.BytesIO()
    record = {"format": FORMAT, **asdict(announcement)}
    fastavro.schemaless_writer(out, schema("key_announcement"), record)
    return out.getvalue()


def decode_announcement(data: bytes) -> KeyAnnouncement:
    """Read a payload. Raises DecodeError: garbage, another format, trailing bytes, not canonical."""
    stream = io.BytesIO(data)
    try:
        raw: Any = fastavro.schemaless_reader(stream, schema("key_announcement"), None)
    except Exception as error:  # fastavro raises many types on garbage; all mean the same here
        raise DecodeError(f"not a key announcement: {type(error).__name__}") from error
    found = raw.pop("format")
    if found != FORMAT:
        raise DecodeError(f"key announcement of format {found}, expected {FORMAT}", hint="upgrade this node")
    if stream.tell() != len(data):
        raise DecodeError(f"{len(data) - stream.tell()} bytes after the key announcement")
    announcement = KeyAnnouncement(**raw)
    # Avro allows padded integers; one content must have one encoding, or its hash names nothing.
    if not _in_range(announcement) or encode_announcement(announcement) != data:
        raise DecodeError("key announcement is not in its canonical encoding")
    return announcement


def signed_at(payload: bytes) -> Signed:
    """When an announcement says it was made: it has no place in a chain. Raises DecodeError."""
    said = decode_announcement(payload)
    return Signed(said.chain, 0, said.created_at)


def _in_range(a: KeyAnnouncement) -> bool:
    longs = (a.epoch, a.created_at)
    return all(_MIN_LONG <= n <= _MAX_LONG for n in longs) and 0 <= a.worker <= 0xFFFF and a.epoch >= 0


def announce(
    key: SealingKey, cluster: str, chain: str, origin: str, epoch: int, provider: KekProvider
) -> KeyAnnouncement:
    """Wrap a new data key under the provider's KEK and say so. Raises KeyUnavailableError."""
    if (cluster, chain) != (key.cluster, key.chain):
        raise KeyUnavailableError(
            f"data key {key.dek_id} was made for {key.cluster}/{key.chain}, not for {cluster}/{chain}"
        )
    wrapped = provider.wrap(key.secret, key_context(cluster, chain, key.dek_id))
    return KeyAnnouncement(
        cluster=cluster,
        chain=chain,
        origin=origin,
        dek_id=key.dek_id,
        epoch=epoch,
        kms_provider=provider.name,
        kek_id=wrapped.kek_id,
        wrap_algorithm=wrapped.algorithm,
        algorithm=ALGORITHM,
        wrapped_dek=wrapped.data,
        commitment=key.commitment,
        worker=key.worker,
        created_at=key.created_at,
    )


def unwrap(announcement: KeyAnnouncement, provider: KekProvider) -> OpeningKey:
    """The key of a verified announcement.

    Raises KeyUnavailableError (another provider, KEK gone, KMS refuses) or UnsealError (not the key the
    announcement commits to).
    """
    a = announcement
    if a.algorithm != ALGORITHM:
        raise KeyUnavailableError(
            f"data key {a.dek_id} is for {a.algorithm}, this node knows {ALGORITHM}", hint="upgrade this node"
        )
    _require_provider(a, provider)
    context = key_context(a.cluster, a.chain, a.dek_id)
    secret = provider.unwrap(a.wrapped_dek, a.wrap_algorithm, context, a.kek_id)
    return OpeningKey(secret, a.cluster, a.chain, a.dek_id, a.commitment)


def _require_provider(a: KeyAnnouncement, provider: KekProvider) -> None:
    if a.kms_provider != provider.name:
        raise KeyUnavailableError(
            f"data key {a.dek_id} was wrapped by KMS provider {a.kms_provider!r},"
            f" this node uses {provider.name!r}",
            hint="set [encryption.kms] to the KMS both nodes share",
        )


def wrap_again(announcement: KeyAnnouncement, secret: bytes, provider: KekProvider) -> KeyAnnouncement:
    """The same key under the KEK's newest version. Raises KeyUnavailableError, UnsealError.

    The commitment is held against the secret first: a wrong key announced anew would be lost.
    """
    a = announcement
    OpeningKey(secret, a.cluster, a.chain, a.dek_id, a.commitment).wipe()
    wrapped = provider.wrap(secret, key_context(a.cluster, a.chain, a.dek_id))
    return replace(
        a,
        kms_provider=provider.name,
        kek_id=wrapped.kek_id,
        wrap_algorithm=wrapped.algorithm,
        wrapped_dek=wrapped.data,
    )


def rewrap(announcement: KeyAnnouncement, provider: KekProvider) -> KeyAnnouncement:
    """The same for a key that only the KMS can open. Raises KeyUnavailableError, UnsealError."""
    a = announcement
    _require_provider(a, provider)
    context = key_context(a.cluster, a.chain, a.dek_id)
    return wrap_again(a, provider.unwrap(a.wrapped_dek, a.wrap_algorithm, context, a.kek_id), provider)


def same_key(one: KeyAnnouncement, other: KeyAnnouncement) -> bool:
    """Whether two announcements are of one key and differ in its wrapping at most."""
    return one == replace(
        other,
        kms_provider=one.kms_provider,
        kek_id=one.kek_id,
        wrap_algorithm=one.wrap_algorithm,
        wrapped_dek=one.wrapped_dek,
    )


class KeyRing:
    """Opened keys by dek_id, least recently used out first, each for at most `lifetime` seconds.

    A key that leaves is dropped, not wiped: a batch under way may still hold it, and when the last holder
    lets go, OpenSSL cleanses it. `clear` wipes all.
    """

    def __init__(
        self, capacity: int = 64, lifetime: float = 3600.0, clock: Callable[[], float] = lifetime_clock
    ) -> None:
        if capacity < 1:
            raise ValueError("a key ring holds at least one key")
        self._capacity, self._lifetime, self._clock = capacity, lifetime, clock
        self._keys: OrderedDict[str, tuple[OpeningKey, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._keys)

    def get(self, dek_id: str) -> OpeningKey | None:
        """The key if it is here and not too old; the caller unwraps its announcement otherwise."""
        found = self._keys.get(dek_id)
        if found is None:
            return None
        if self._clock() >= found[1]:
            del self._keys[dek_id]
            return None
        self._keys.move_to_end(dek_id)
        return found[0]

    def add(self, key: OpeningKey) -> None:
        """Keep a key. Raises UnsealError when its name is already taken by a different key."""
        known = self.get(key.dek_id)
        if known is not None and known.commitment != key.commitment:
            raise UnsealError(
                f"two different data keys are announced as {key.dek_id}", hint="refuse the later announcement"
            )
        self._keys[key.dek_id] = (key, self._clock() + self._lifetime)
        self._keys.move_to_end(key.dek_id)
        now = self._clock()
        for dek_id in [name for name, (_, until) in self._keys.items() if now >= until]:
            del self._keys[dek_id]
        while len(self._keys) > self._capacity:
            self._keys.popitem(last=False)

    def open(self, announcement: KeyAnnouncement, provider: KekProvider) -> OpeningKey:
        """The key of a verified announcement, from the ring or from the KMS."""
        found = self.get(announcement.dek_id)
        if found is None or found.chain != announcement.chain or found.commitment != announcement.commitment:
            found = unwrap(announcement, provider)
            self.add(found)
        return found

    def drop(self, dek_id: str) -> None:
        """Wipe one key: it was destroyed on purpose."""
        found = self._keys.pop(dek_id, None)
        if found is not None:
            found[0].wipe()

    def clear(self) -> None:
        """Wipe every key."""
        for key, _ in self._keys.values():
            key.wipe()
        self._keys.clear()
