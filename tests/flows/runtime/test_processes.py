"""What a process that computes is given."""

import os

import pytest

from flows.runtime.processes import _environment


def test_a_process_works_as_the_trainer_where_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = {"AWS_ACCESS_KEY_ID": "pipeline", "AWS_SECRET_ACCESS_KEY": "p", "AWS_SESSION_TOKEN": "t", "AWS_PROFILE": "x"}
    kept = {"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9000", "PATH": "/bin"}
    for name in os.environ:
        monkeypatch.delenv(name)
    for name, value in (ours | kept | {"PREFECT_API_AUTH_STRING": "gpt2:secret"}).items():
        monkeypatch.setenv(name, value)
    assert _environment() == dict(os.environ)
    monkeypatch.setenv("TRAINER_ACCESS_KEY_ID", "trainer")
    monkeypatch.setenv("TRAINER_SECRET_ACCESS_KEY", "s")
    assert _environment() == kept | {"AWS_ACCESS_KEY_ID": "trainer", "AWS_SECRET_ACCESS_KEY": "s"}
