"""[replication.clock_sync]: how far the clocks of nodes may be apart."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from vsql_shared.config.section import Section
from vsql_shared.config.values import Duration, Whole, refusal


def _by_commits(value: bool) -> bool:
    if not value:
        raise refusal("must be true: a row's version is the time its transaction was committed at")
    return value


class ClockSyncSettings(Section):
    """[replication.clock_sync]: how far the clocks of nodes may be apart."""

    require_ntp: bool = False
    """Whether services start only where chrony, systemd-timesyncd or the kernel says that somebody keeps this
    host's clock."""
    measure_every: Annotated[Duration, Field(ge=timedelta(seconds=1), le=timedelta(days=1))] = timedelta(
        seconds=30
    )
    """How often this node asks each other node for the time."""
    warn_drift_ms: Annotated[Whole, Field(ge=1, le=86_400_000)] = 100
    """Milliseconds the clocks of two nodes' databases are apart for sure before that is a warning."""
    max_drift_ms: Annotated[Whole, Field(ge=1, le=86_400_000)] = 1000
    """Milliseconds beyond which it is an error; with require_ntp, how wrong this host's may be at most."""

    use_commit_timestamp: Annotated[bool, AfterValidator(_by_commits)] = True
    """Always true: what is later is said by commits' times."""
    tie_breaker: Literal["node_priority"] = "node_priority"
    """Who stands where two commits have one time."""

    @model_validator(mode="after")
    def _warned_first(self) -> ClockSyncSettings:
        if self.warn_drift_ms > self.max_drift_ms:
            raise refusal(
                f"warn_drift_ms ({self.warn_drift_ms}) must not exceed max_drift_ms ({self.max_drift_ms})"
            )
        return self
