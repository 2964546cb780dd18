"""A schema registry's frame before a pack: magic byte 0, the schema's id in four bytes, then the pack.

Not here: the pack (pack.py) and how an id is come by (kafka/schema_registry.py). Pure. Rules
(docs/design/0021-registry.md):

* The first byte tells a framed pack from a bare one: a pack begins with its format, an Avro int, and no
  format is 0. So framed and bare ones may lie side by side in a topic.
* A frame is outside of everything that is authenticated, and nothing follows from it: it is taken off, the id
  is not looked at, and our own schema reads the pack. It is for other people's tools.
* One frame at most: what lies behind one begins with a format again.
"""

from __future__ import annotations

import struct

from vsql_shared.errors import DecodeError

_FRAME = struct.Struct(">BI")
_MAGIC = 0
FRAME_SIZE = _FRAME.size
MAX_ID = 0x7FFF_FFFF
"""Ids are positive Java ints."""


def frame(schema_id: int) -> bytes:
    """What stands before each pack; the same for all of them."""
    return _FRAME.pack(_MAGIC, schema_id)


def without_frame(message: bytes) -> bytes:
    """The pack of a message, framed or bare. Raises DecodeError where a frame holds none."""
    if message[:1] != b"\0":
        return message
    if len(message) <= FRAME_SIZE:
        raise DecodeError(f"not a pack: {len(message)} bytes, of which a schema's id takes {FRAME_SIZE}")
    return message[FRAME_SIZE:]
