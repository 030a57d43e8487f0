"""In which order Prefect's server looks at events: in Prefect's own, but none waits for one of before its start.

Named by the setting PREFECT_SERVER_EVENTS_CAUSAL_ORDERING. An event that follows another one within 5 minutes waits
until the server has seen that one, 15 minutes at most. What it has seen it knows in memory only (3.8): of a run whose
state changed before and after a restart, the second change waited all the 15 minutes, and no automation saw it.
"""

import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from uuid import UUID

from prefect.server.events.ordering import event_handler, memory
from prefect.server.events.schemas.events import ReceivedEvent

STARTED_MILLISECONDS = time.time_ns() // 1_000_000  # the server imports this module when it starts


class CausalOrdering(memory.CausalOrdering):
    """Prefect's own, for which nothing follows an event of before this server's start."""

    @asynccontextmanager
    async def preceding_event_confirmed(
        self, handler: event_handler, event: ReceivedEvent, depth: int = 0
    ) -> AsyncGenerator[None, None]:
        """A block in which the event is looked at. Raises EventArrivedEarly when it has to wait."""
        if event.follows and made_milliseconds(event.follows) < STARTED_MILLISECONDS:
            event = event.model_copy(update={"follows": None})
        async with super().preceding_event_confirmed(handler, event, depth):
            yield


def made_milliseconds(number: UUID) -> int:
    """When a number of version 7 was made, in milliseconds since 1970 (RFC 9562 section 5.7); of others: never ago."""
    return number.int >> 80 if number.version == 7 else STARTED_MILLISECONDS
