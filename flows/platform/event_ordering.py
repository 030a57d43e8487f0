"""Works around a bug of Prefect's server (3.9.1): after a restart, automations see some events 15 minutes late.

An event may name a preceding event of the last 5 minutes. The server delays the event until it has seen the preceding
one, for at most 15 minutes. It keeps the seen events in memory only, so an event whose predecessor came before
a restart waits the full 15 minutes; here it does not wait. PREFECT_SERVER_EVENTS_CAUSAL_ORDERING selects this module.
"""

import time
from uuid import UUID

from prefect.server.events.ordering import memory
from prefect.server.events.schemas.events import ReceivedEvent

STARTED_MILLISECONDS = time.time_ns() // 1_000_000  # the server imports this module when it starts


class CausalOrdering(memory.CausalOrdering):
    """Prefect's ordering, except that no event waits for an event from before the server's start."""

    async def wait_for_leader(self, event: ReceivedEvent) -> None:
        """Return when the event can be handled. Raises EventArrivedEarly when its preceding event is still missing."""
        if event.follows is None or created_milliseconds(event.follows) >= STARTED_MILLISECONDS:
            await super().wait_for_leader(event)


def created_milliseconds(event_id: UUID) -> int:
    """Creation time (Unix epoch) of a version 7 UUID (RFC 9562 section 5.7). Other versions: the server's start."""
    return event_id.int >> 80 if event_id.version == 7 else STARTED_MILLISECONDS
