"""Works around a fault of Prefect's server (3.8): after a restart, automations see some events 15 minutes late.

An event may name a preceding event, of the last 5 minutes; the server then delays it, for at most 15 minutes, until it
has seen the preceding one. It remembers in memory only what it has seen. So an event that follows one from before the
restart waited the full 15 minutes. Here it does not wait. PREFECT_SERVER_EVENTS_CAUSAL_ORDERING names this module.
"""

import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from uuid import UUID

from prefect.server.events.ordering import event_handler, memory
from prefect.server.events.schemas.events import ReceivedEvent

STARTED_MILLISECONDS = time.time_ns() // 1_000_000  # the server imports this module when it starts


class CausalOrdering(memory.CausalOrdering):
    """Prefect's ordering, except that no event waits for one from before the server's start."""

    @asynccontextmanager
    async def preceding_event_confirmed(
        self, handler: event_handler, event: ReceivedEvent, depth: int = 0
    ) -> AsyncGenerator[None, None]:
        """Handle the event inside the block. Raises EventArrivedEarly when its preceding event is still missing."""
        if event.follows and created_milliseconds(event.follows) < STARTED_MILLISECONDS:
            event = event.model_copy(update={"follows": None})
        async with super().preceding_event_confirmed(handler, event, depth):
            yield


def created_milliseconds(event_id: UUID) -> int:
    """Creation time since 1970, from a UUID of version 7 (RFC 9562 section 5.7). For other versions: now."""
    return event_id.int >> 80 if event_id.version == 7 else STARTED_MILLISECONDS
