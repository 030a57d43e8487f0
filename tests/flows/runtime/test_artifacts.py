"""Artifacts in Prefect's UI: retried while the server is down, and never fatal."""

from base64 import b64decode
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from prefect import flow

from flows.runtime import artifacts
from flows.runtime.artifacts import Picture, replace, show
from tests.flows.client import call_api
from tests.polling import poll

SVG = '<svg xmlns="http://www.w3.org/2000/svg"><text fill="currentColor">{}</text></svg>'


def test_a_temporary_failure_is_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    errors = [httpx.ConnectError("down"), httpx.ReadTimeout("slow")]
    waits: list[float] = []

    def create(**arguments: Any) -> Any:
        assert arguments == {"key": "a", "table": []}
        if errors:
            raise errors.pop(0)
        return 7

    monkeypatch.setattr(artifacts.time, "sleep", waits.append)
    assert show(create, key="a", table=[]) == 7
    assert waits == [1, 2]


def test_a_server_that_stays_down_does_not_fail_the_flow(api: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def create(**_: Any) -> Any:
        raise httpx.ConnectError("down")

    @flow(name="down")
    def shown() -> Any:
        return show(create, key="a")

    monkeypatch.setattr(artifacts, "WAITS_SECONDS", (0, 0))
    assert shown() is None


def test_an_update_that_fails_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    class Down:
        def __enter__(self) -> Any:
            raise httpx.ConnectError("down")

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(artifacts, "get_client", lambda **_: Down())
    replace(uuid4(), 50.0)
    replace(None, 50.0)


def test_a_picture_stays_one_artifact_when_it_is_redrawn(api: str) -> None:
    @flow(name="drawing")
    def drawing() -> UUID | None:
        picture = Picture("drawn", "A drawing")
        for text in ("first", "last"):
            picture.show(SVG.format(text))
        return picture._artifact

    artifact_id = drawing()
    [artifact] = poll(lambda: call_api(api, "/artifacts/filter", {"artifacts": {"key": {"any_": ["drawn"]}}}))
    assert (artifact["id"], artifact["type"]) == (str(artifact_id), "image")
    assert artifact["flow_run_id"] is not None
    drawn = b64decode(artifact["data"].partition("base64,")[2]).decode()
    assert drawn == SVG.format("last").replace("currentColor", artifacts.INK)
