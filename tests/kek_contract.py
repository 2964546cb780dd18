"""What every provider of KEKs must do, as one function: for services on this machine and in a cloud."""

from __future__ import annotations

import pytest

from vsql_shared.crypto.announce import announce, unwrap
from vsql_shared.crypto.dek import KeyLimits, SealingKey, key_context
from vsql_shared.errors import KeyUnavailableError
from vsql_shared.kms.base import KekProvider

SECRET = bytes(range(32))
CONTEXT = key_context("cluster", "pub.node-a", "dek-1")
ELSEWHERE = key_context("cluster", "pub.node-b", "dek-1")


def keeps_its_promises(
    producer: KekProvider, consumer: KekProvider, *, binds_context: bool, strength_bits: int
) -> None:
    """Two nodes' providers of one KEK: what one wraps the other unwraps, and nothing else."""
    assert isinstance(producer, KekProvider)
    assert producer.strength_bits == strength_bits
    wrapped = producer.wrap(SECRET, CONTEXT)
    assert SECRET not in wrapped.data
    assert wrapped.kek_id == producer.kek_id
    assert (wrapped.kek_id, strength_bits, True) in consumer.versions()
    assert consumer.unwrap(wrapped.data, wrapped.algorithm, CONTEXT, wrapped.kek_id) == SECRET

    for place in (-1, len(wrapped.data) // 2):
        altered = bytearray(wrapped.data)
        altered[place] ^= 1
        with pytest.raises(KeyUnavailableError) as refused:
            consumer.unwrap(bytes(altered), wrapped.algorithm, CONTEXT, wrapped.kek_id)
        assert refused.value.hint
    for cut in (b"", wrapped.data[:-1]):
        with pytest.raises(KeyUnavailableError):
            consumer.unwrap(cut, wrapped.algorithm, CONTEXT, wrapped.kek_id)
    if binds_context:
        with pytest.raises(KeyUnavailableError):
            consumer.unwrap(wrapped.data, wrapped.algorithm, ELSEWHERE, wrapped.kek_id)
    with pytest.raises(KeyUnavailableError, match="'ROT13' is unknown"):
        consumer.unwrap(wrapped.data, "ROT13", CONTEXT, wrapped.kek_id)
    for stranger in ("", "other-kek/1", f"https://evil.example/{wrapped.kek_id}"):
        with pytest.raises(KeyUnavailableError):
            consumer.unwrap(wrapped.data, wrapped.algorithm, CONTEXT, stranger)

    consumer.close()  # and is opened again by its next use
    key = SealingKey.generate("cluster", "pub.node-a", 0, KeyLimits())
    said = announce(key, "cluster", "pub.node-a", "node-a", 1, producer)
    assert (said.kms_provider, said.kek_id) == (producer.name, wrapped.kek_id)
    assert unwrap(said, consumer).commitment == key.commitment
    producer.close()
    consumer.close()
