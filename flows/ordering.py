"""In which order Prefect's server looks at events: as it comes with it, but for events of before the server's start.

Named by the setting PREFECT_SERVER_EVENTS_CAUSAL_ORDERING. An event that follows another one within 5 minutes waits
until the server has seen that one, 15 minutes at most. What it has seen it knows in memory only (3.8): of a run whose
state changed before and after a restart, the second change waited all the 15 minutes, and no automation saw it.
"""

import time
from uuid import UUID

from prefect.server.events.ordering import db
from prefect.server.events.schemas.events import Event

STARTED_MILLISECONDS = time.time_ns() // 1_000_000  # the server imports this module when it starts


class CausalOrdering(db.CausalOrdering):
    """Prefect's, which keeps events that wait in the database, where they outlive the server."""

    async def event_has_been_seen(self, event: UUID | Event) -> bool:
        """Whether nobody need wait for that event: it was looked at, or is older than this server."""
        number = event.id if isinstance(event, Event) else event
        return made_milliseconds(number) < STARTED_MILLISECONDS or await super().event_has_been_seen(number)


def made_milliseconds(number: UUID) -> int:
    """When a number of version 7 was made, in milliseconds since 1970 (RFC 9562 section 5.7); of others: never ago."""
    return number.int >> 80 if number.version == 7 else STARTED_MILLISECONDS
