"""Which events wait for others, and that automations see events after a restart of Prefect's server."""

import asyncio
import time
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from prefect.server.events.ordering import EventArrivedEarly
from prefect.server.events.schemas.events import ReceivedEvent, Resource

from flows.platform import event_ordering, server
from model.config import RunConfig
from tests.flows.client import run_gpt2
from tests.flows.deployments import set_state, start, states
from tests.polling import poll
from tests.ports import free_port

OLD = UUID("017f22e2-79b0-7cc3-98c4-dc0c0c07398f")  # created in 2022, from RFC 9562 A.6


def test_the_creation_time_of_a_uuid_of_version_7() -> None:
    assert event_ordering.created_milliseconds(OLD) == 1_645_557_742_000


def handled_at_once(follows: UUID | None, event_id: UUID) -> bool:
    """Whether an event that follows another one is handled without waiting."""
    resource = Resource({"prefect.resource.id": "prefect.flow-run.1"})
    occurred = datetime.now(UTC)
    event = ReceivedEvent(occurred=occurred, event="state", resource=resource, id=event_id, follows=follows)

    async def handler(event: ReceivedEvent, depth: int = 0) -> None:
        raise AssertionError

    async def handle() -> bool:
        async with event_ordering.CausalOrdering("test").preceding_event_confirmed(handler, event):
            return True

    try:
        return asyncio.run(handle())
    except EventArrivedEarly:
        return False


def test_an_event_waits_only_for_one_that_can_still_arrive() -> None:
    created_now = UUID(int=(time.time_ns() // 1_000_000 << 80) | 7 << 76 | 2 << 62)
    assert handled_at_once(follows=None, event_id=uuid4())
    assert handled_at_once(follows=OLD, event_id=uuid4())
    assert not handled_at_once(follows=created_now, event_id=uuid4())
    assert not handled_at_once(follows=uuid4(), event_id=uuid4())


def test_an_event_that_arrives_late_itself_is_handled_at_once() -> None:
    events = event_ordering.CausalOrdering("test")
    assert not asyncio.run(events.event_has_been_seen(OLD))  # the server discards events it has seen
    assert handled_at_once(follows=None, event_id=OLD)
    assert asyncio.run(events.event_has_been_seen(OLD))


@pytest.mark.nightly
def test_a_run_that_crashes_after_a_restart_of_the_server_is_restarted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "HOME", tmp_path / ".gpt2")
    port = free_port()
    api = f"http://{server.login()}@127.0.0.1:{port}/api"
    with server.running_server(port):
        code, said = run_gpt2("bootstrap", cwd=tmp_path)  # reads the password itself
        assert code == 0, said
        flow_run = start(api, "demo", RunConfig())
        set_state(api, flow_run, "RUNNING")
    with server.running_server(port):
        set_state(api, flow_run, "CRASHED")
        poll(lambda: "AwaitingRetry" in states(api, flow_run))
