"""What the name of a chain says: who signs it, and whether it acknowledges another one."""

from __future__ import annotations

from vsql_shared.errors import ChainError


def writer_of(chain: str) -> str:
    """The node that signs a chain, by the chain's name (names.py). Raises ChainError."""
    match chain.split("."):
        case [_, origin] | [_, origin, "copy", _]:
            return origin
        case [_, _, "ack", target] | [_, _, "copy", _, "ack", target]:
            return target
        case _:
            raise ChainError(f"{chain[:200]!r} is not the name of a chain")


def acknowledged(chain: str) -> str:
    """The chain that one of acknowledgements answers; '' for another one."""
    return chain.rsplit(".ack.", 1)[0] if acknowledges(chain) else ""


def acknowledges(chain: str) -> bool:
    """Whether a chain is one of acknowledgements, by its name."""
    parts = chain.split(".")
    return len(parts) > 3 and parts[-2] == "ack"
