"""What is seen of a training while it goes on."""

import threading
from typing import Any

import pytest

from flows import train
from model.run import Run
from storage.errors import StoreUnavailable
from storage.store import Store


def test_the_bar_outlives_a_store_that_fails_and_a_loss_that_is_no_number(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended, said = threading.Event(), []

    class Bar:
        def to(self, done: int, text: str) -> None:
            said.append((done, text))
            ended.set()

    progress = {"step": 3, "since_checkpoint": [{"loss": None, "tokens_per_second": 7.0}]}
    answers: list[Any] = [progress, StoreUnavailable("it answers 503")]

    def read(*_: object) -> Any:
        if isinstance(found := answers.pop(), Exception):
            raise found
        return found

    monkeypatch.setattr(train, "read_json", read)
    monkeypatch.setattr(train, "WATCH_SECONDS", 0.01)
    train._watch(store, Run("tiny", {}, None, "", None, ""), Bar(), ended)  # type: ignore[arg-type]
    assert said == [(3, "loss no number  7 tokens/s")]
