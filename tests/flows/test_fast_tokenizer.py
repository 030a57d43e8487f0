"""The extra `fast` under Prefect: the same version with and without it, whatever riptoken answers."""

from pathlib import Path
from typing import Any

import pytest

from flows.pretrain import build_dataset
from model import fast_tokenizer
from model.config import RunConfig
from storage.layout import open_store
from storage.manifest import read_manifest
from storage.shards import read_record
from tests import making

pytestmark = pytest.mark.usefixtures("api")


class Core:
    """riptoken, with another last id for the documents of the second source file."""

    def __init__(self) -> None:
        self._whole = fast_tokenizer._core()

    def encode_ordinary(self, text: str) -> list[int]:
        found = list(self._whole.encode_ordinary(text))
        return found if int(text.split()[1].rstrip(".")) < 40 else [*found[:-1], found[-1] ^ 1]


def test_a_shard_that_differs_is_made_with_tiktoken(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = making.build_dataset(config)
    resources = config.resources.model_copy(update={"fast_tokenizer": True})
    changes: dict[str, Any] = {"resources": resources, "store_url": str(tmp_path / "fast")}
    core = Core()
    monkeypatch.setattr(fast_tokenizer, "_core", lambda: core)
    digest = build_dataset(config.model_copy(update=changes))
    assert digest == expected.digest
    store = open_store(changes["store_url"])
    manifest = read_manifest(store, "small", digest)
    made_with = {
        name: {"riptoken", "tiktoken"} & read_record(store, "small", name).versions.keys()
        for name in manifest.shard_ids
    }
    assert made_with == {
        name: {"riptoken"} if name.startswith("file_0") else {"tiktoken"} for name in manifest.shard_ids
    }
    assert len({name[:6] for name in made_with}) == 2
