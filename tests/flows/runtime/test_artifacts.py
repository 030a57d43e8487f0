"""Artifacts in Prefect's UI: retried while the server is down, and never fatal."""

from typing import Any

import httpx
import pytest
from prefect import flow

from flows.runtime import progress
from flows.runtime.progress import show


def test_a_temporary_failure_is_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = [httpx.ConnectError("down"), httpx.ReadTimeout("slow")]
    waits: list[float] = []

    created: list[dict[str, Any]] = []

    def create(**arguments: Any) -> None:
        if errors:
            raise errors.pop(0)
        created.append(arguments)

    monkeypatch.setattr(progress.time, "sleep", waits.append)
    show(create, key="a", table=[])
    assert (created, waits) == ([{"key": "a", "table": []}], [1, 2])


def test_a_server_that_stays_down_does_not_fail_the_flow(api: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def create(**_: Any) -> Any:
        raise httpx.ConnectError("down")

    @flow(name="down")
    def shown() -> int:
        show(create, key="a")
        return 7

    monkeypatch.setattr(progress, "WAITS_SECONDS", (0, 0))
    assert shown() == 7
