"""What automations make of events around a restart of Prefect's server."""

import asyncio
import time
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from prefect.server.events.ordering import EventArrivedEarly
from prefect.server.events.schemas.events import ReceivedEvent, Resource

from flows.platform import automations, event_ordering, server
from model.config import RunConfig
from tests.flows.client import poll, run_gpt2
from tests.flows.deployments import set_state, start, states
from tests.servers import free_port

OLD = UUID("017f22e2-79b0-7cc3-98c4-dc0c0c07398f")  # of 2022, from RFC 9562 A.6


def test_the_time_in_a_number_of_version_7() -> None:
    assert event_ordering.made_milliseconds(OLD) == 1_645_557_742_000


def looked_at(follows: UUID | None, number: UUID) -> bool:
    """Whether an event is looked at at once that follows another one."""
    resource = Resource({"prefect.resource.id": "prefect.flow-run.1"})
    occurred = datetime.now(UTC)
    event = ReceivedEvent(occurred=occurred, event="state", resource=resource, id=number, follows=follows)

    async def handler(event: ReceivedEvent, depth: int = 0) -> None:
        raise AssertionError

    async def look() -> bool:
        async with event_ordering.CausalOrdering("test").preceding_event_confirmed(handler, event):
            return True

    try:
        return asyncio.run(look())
    except EventArrivedEarly:
        return False


def test_an_event_waits_only_for_one_that_can_still_come() -> None:
    made_now = UUID(int=(time.time_ns() // 1_000_000 << 80) | 7 << 76 | 2 << 62)
    assert looked_at(follows=None, number=uuid4())
    assert looked_at(follows=OLD, number=uuid4())
    assert not looked_at(follows=made_now, number=uuid4())
    assert not looked_at(follows=uuid4(), number=uuid4())


def test_an_event_that_comes_late_itself_is_looked_at() -> None:
    events = event_ordering.CausalOrdering("test")
    assert not asyncio.run(events.event_has_been_seen(OLD))  # what was seen is thrown away
    assert looked_at(follows=None, number=OLD)
    assert asyncio.run(events.event_has_been_seen(OLD))


@pytest.mark.full
@pytest.mark.timeout(300)
def test_a_run_that_crashes_after_a_restart_of_the_server_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "HOME", tmp_path / ".gpt2")
    port = free_port()
    api = f"http://127.0.0.1:{port}/api"
    with server.running_server(port):
        code, said = run_gpt2("bootstrap", cwd=tmp_path, api=api)
        assert code == 0, said
        flow_run = start(api, "demo", RunConfig())
        set_state(api, flow_run, "RUNNING")
    with server.running_server(port):
        set_state(api, flow_run, "CRASHED")
        poll(lambda: "AwaitingRetry" in states(api, flow_run), automations.SETTLE_SECONDS + 40)
