"""Which shard jobs a build runs, counted where the flow hands them over: nothing is waited for, none is missed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from flows.pretrain import build_dataset
from flows.tokenise import tokenise_shards
from model.config import RunConfig


class Jobs:
    """The shards that tasks were asked to make, in this process."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def made_by(self, config: RunConfig) -> tuple[str, list[str]]:
        """What one more build seals, and the shards that it runs a job for, sorted."""
        before = len(self.asked)
        digest = build_dataset(config)
        return digest, sorted(self.asked[before:])


@contextmanager
def counted() -> Iterator[Jobs]:
    """Note the jobs of every flow of this process while the block lasts."""
    jobs, submit = Jobs(), tokenise_shards.submit

    def noted(name: str, asked: list[Any], *rest: Any) -> Any:
        jobs.asked += [job.shard_id for job in asked]
        return submit(name, asked, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenise_shards, "submit", noted)
        yield jobs
