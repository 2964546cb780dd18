"""Where to go on in the audit partition: at the stored offset, if Kafka still has there what it had.

Not here: what is read from there on (intake.py). Rules (docs/design/0006, "Topics that were cut"):

* The stored offset counts when the record before it is the last entry that was applied, or a hole that
  compaction left. Otherwise the partition was cut (DeleteRecords, retention) or made anew.
* Then the chain's next entry decides, wherever it lies: it is signed and linked to the last one applied, so
  nothing is missing before it. Reading goes on there.
* Without it something may be missing: DivergedError. Only a stream that has read nothing yet may wait for its
  first entry.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from vsql_consumers.source import Place, read_chain, read_records
from vsql_consumers.verify import record_name
from vsql_shared import names
from vsql_shared.audit.chain import Accepted, ChainHead, ChainReader
from vsql_shared.audit.dsse import document_hash
from vsql_shared.errors import ChainError, DecodeError, DivergedError, TransientError, VerificationError

if TYPE_CHECKING:
    from vsql_consumers.means import Means

_log = logging.getLogger(__name__)


def first_offset(means: Means, audit: Place, head: ChainHead, stored: int) -> int:
    """The offset to read the audit partition from; `stored` is what the position says."""
    low, end = means.source.ends(*audit)
    name = f"{audit[0]}/{audit[1]}"
    if stored > end:
        what = f"Kafka lost the end of topic {name}: it ends at offset {end}"
    elif stored < low:
        what = f"Kafka deleted what lay before offset {low} of topic {name}"
    elif head.sequence and low < stored and _is_another(means, audit, head, stored - 1):
        what = f"topic {name} was made anew or altered: offset {stored - 1} holds another record"
    else:
        return stored
    return _next_entry(means, audit, head, low, f"{what}; this node has applied what lay before {stored}")


def _is_another(means: Means, audit: Place, head: ChainHead, offset: int) -> bool:
    """Whether a record that is not the last entry lies in its place; no record there says nothing."""
    records = read_records(means.settings, *_reader_names(means), audit, offset)
    found, _, value = next(records, (-1, None, None))
    records.close()
    return found == offset and value is not None and document_hash(value) != head.entry_hash


def _next_entry(means: Means, audit: Place, head: ChainHead, low: int, what: str) -> int:
    """Offset of the entry that follows the head, looked for in the whole partition."""
    _log.warning("%s; looking for the chain's next entry", what)
    stream = means.stream
    reader = ChainReader(means.settings.cluster.name, stream.chain, stream.origin, means.trust, head)
    others = False
    entries = read_chain(means.settings, *_reader_names(means), audit, stream.chain, low)
    for offset, encoded in entries:
        if means.stop.is_set():
            raise TransientError("told to stop")
        try:
            if isinstance(reader.accept(encoded, record_name(*audit, offset)), Accepted):
                return offset
        except ChainError:
            others = True  # genuine, and not the next one
        except (VerificationError, DecodeError):
            continue  # not the origin's, and shows nothing
    text = f"{what}, and entry {head.sequence + 1} of its chain is not among what is left"
    if not head.sequence and not others:
        raise TransientError(text, hint="the stream begins with its first entry")
    raise DivergedError(text, hint="restore the topic and give `retry`, or initialise this node anew")


def _reader_names(means: Means) -> tuple[str, str]:
    """Client and group, as the stream's own consumer has them."""
    chain, settings = means.stream.chain, means.settings
    group = names.group_id(settings.cluster.name, chain, settings.cluster.node_name)
    return f"vsql-sync-consumer-{chain}", group
