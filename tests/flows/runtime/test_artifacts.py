"""What Prefect's UI shows: waited for while the server is away, never a reason to fail."""

from base64 import b64decode
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from prefect import flow

from flows.runtime import artifacts
from flows.runtime.artifacts import Picture, replace, show
from tests.flows.client import ask, poll

SVG = '<svg xmlns="http://www.w3.org/2000/svg"><text fill="currentColor">{}</text></svg>'


def test_a_server_that_comes_back_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Any] = [httpx.ConnectError("away"), httpx.ReadTimeout("slow"), 7]
    waited: list[float] = []

    def create(**what: Any) -> Any:
        assert what == {"key": "a", "table": []}
        if isinstance(answer := answers.pop(0), Exception):
            raise answer
        return answer

    monkeypatch.setattr(artifacts.time, "sleep", waited.append)
    assert show(create, key="a", table=[]) == 7
    assert waited == [1, 2]


def test_a_server_that_stays_away_fails_no_flow(api: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def create(**_: Any) -> Any:
        raise httpx.ConnectError("away")

    @flow(name="away")
    def shown() -> Any:
        return show(create, key="a")

    monkeypatch.setattr(artifacts, "WAITS_SECONDS", (0, 0))
    assert shown() is None


def test_a_change_that_nobody_takes_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Away:
        def __enter__(self) -> Any:
            raise httpx.ConnectError("away")

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(artifacts, "get_client", lambda **_: Away())
    replace(uuid4(), 50.0)
    replace(None, 50.0)


def test_a_picture_is_one_artifact_however_often_it_changes(api: str) -> None:
    @flow(name="drawing")
    def drawing() -> UUID | None:
        picture = Picture("drawn", "A drawing")
        for text in ("first", "last"):
            picture.show(SVG.format(text))
        return picture._artifact

    made = drawing()
    [found] = poll(lambda: ask(api, "/artifacts/filter", {"artifacts": {"key": {"any_": ["drawn"]}}}))
    assert (found["id"], found["type"]) == (str(made), "image")
    assert found["flow_run_id"] is not None
    drawn = b64decode(found["data"].partition("base64,")[2]).decode()
    assert drawn == SVG.format("last").replace("currentColor", artifacts.INK)
