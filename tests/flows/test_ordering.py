"""What automations make of events around a restart of Prefect's server."""

import asyncio
import time
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from flows import automations, ordering, server
from model.config import RunConfig
from tests.flows.console import poll, run_gpt2
from tests.flows.room import set_state, start, states
from tests.servers import free_port


def test_the_time_in_a_number_of_version_7() -> None:
    assert ordering.made_milliseconds(UUID("017f22e2-79b0-7cc3-98c4-dc0c0c07398f")) == 1_645_557_742_000  # RFC 9562 A.6


def test_an_event_waits_only_for_one_that_can_still_come() -> None:
    events = ordering.CausalOrdering("test")

    def seen(number: UUID) -> bool:
        return asyncio.run(events.event_has_been_seen(number))

    made_now = UUID(int=(time.time_ns() // 1_000_000 << 80) | 7 << 76 | 2 << 62)
    assert seen(UUID("017f22e2-79b0-7cc3-98c4-dc0c0c07398f"))
    assert not seen(made_now)
    assert not seen(uuid4())


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
