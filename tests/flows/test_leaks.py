"""The leak report of a version under Prefect: its contents, its key, and when it is computed."""

import json
from typing import Any

import pytest

from flows.leaks import find_leaks_of_newest
from flows.pretrain import build_dataset
from model.config import RunConfig
from storage.datasets.manifest import Manifest, read_manifest
from storage.errors import ShardCorrupt
from storage.inspection.summary import summarise
from storage.keys import DatasetKeys
from storage.sources import reading
from storage.stores.opening import open_store
from storage.stores.store import Store, overwrite
from tests.damage import flip_bit
from tests.leaks import documents, leaks_of, ngrams_of, repeats_of, restyled, story, words_of
from tests.making import tiny_config, write_parquet

pytestmark = pytest.mark.usefixtures("api")

ENDING = " ".join(f"end{number}" for number in range(12))
SHORT = "Only seven words, and train shows them."


def item(number: int, **changes: Any) -> dict[str, Any]:
    """A HellaSwag item that shares no word with any other text."""
    endings = [story(50_000 + number * 10 + place, 15) for place in range(4)]
    parts = {"activity_label": "Telling", "ctx_a": "x", "ctx_b": ""}  # only ctx is compared
    return parts | {"ctx": story(40_000 + number, 20), "endings": endings, "label": "1"} | changes


ITEMS = [
    item(0),  # not in the dataset
    item(1),  # its context is in train, with other case and punctuation
    item(2),  # half of its context is in train
    item(3, endings=[ENDING, "a", "b", "c"], label="0"),  # the border of context and true ending is in train
    item(4, endings=["a", "b", ENDING.replace("end", "false"), "c"], label="0"),  # a false ending and its context
    item(5, ctx=SHORT, endings=["a", "b", "c", "d"]),  # shorter than an n-gram
    item(6),  # its context is in val alone
    item(7, ctx=" ".join(item(7)["ctx"].split()[:12])),  # 12 words are not an n-gram
]
PLANTED = [
    restyled(f"As we said: {item(1)['ctx']} And so on."),
    story(60_000) + " " + " ".join(item(2)["ctx"].split()[:14]) + " but then",
    " ".join([*item(3)["ctx"].split()[-8:], *ENDING.split()[:5]]),
    f"{ITEMS[4]['ctx']} {ITEMS[4]['endings'][2]}",
    SHORT,
    ITEMS[7]["ctx"],
]


Built = tuple[RunConfig, Store, Manifest]


@pytest.fixture(scope="module")
def built(api: str, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """A dataset with leaks of every kind, built with resources.audit and HellaSwag items that are partly in train."""
    folder = tmp_path_factory.mktemp("audited")
    texts = [story(number) for number in range(60)]
    texts[3] = f"{texts[3]} {item(6)['ctx']}"
    texts[30], texts[31], texts[32] = restyled(texts[1]), texts[29], f"{texts[29]}."
    texts[40:40] = PLANTED
    for number in range(2):
        write_parquet(folder / "source" / f"file_{number}.parquet", texts[number * 33 : number * 33 + 33])
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    settings = [f"evaluation.hellaswag={folder / 'items.jsonl'}", "resources.audit=true", "resources.workers=2"]
    settings.append("data.keep_val_duplicates=true")
    config = tiny_config(str(folder / "store"), str(folder / "source"), *settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "REMEMBERED", folder / "digests")
        digest = build_dataset(config)
    store = open_store(config.store_url)
    return config, store, read_manifest(store, "small", digest)


def test_the_report_of_a_build_equals_a_comparison_of_all_pairs(built: Built) -> None:
    _, store, manifest = built
    report = json.loads(store.read(DatasetKeys("small").leaks(manifest.digest)).body)
    stored = documents(store, "small", manifest)
    train, val = ([one for one in stored if one.split == split] for split in ("train", "val"))
    repeats, leaks = repeats_of(stored), leaks_of(stored)
    shown = set().union(*(ngrams_of(one.words) for one in train))
    contexts = [ngrams_of(words_of(one["ctx"].encode())) for one in ITEMS]
    both = [[ngrams_of(words_of(f"{one['ctx']} {end}".encode())) for end in one["endings"]] for one in ITEMS]
    endings = [set().union(*runs) - context for runs, context in zip(both, contexts, strict=True)]
    numbers = {
        name: [number for number, runs in enumerate(ngrams_of_items) if runs & shown]
        for name, ngrams_of_items in (("contexts", contexts), ("endings", endings))
    }
    assert numbers == {"contexts": [1, 2, 4], "endings": [3, 4]}
    assert report["items"] == {"count": 8, "words": 13, "shorter": 2, "contexts": 3, "endings": 2, "numbers": numbers}
    assert report["documents"] == {"train": len(train), "val": len(val)}
    assert (
        report["duplicates"] == {"train": len(repeats), "val_in_train": len(leaks)} == {"train": 2, "val_in_train": 1}
    )
    assert [tuple(one) for one in report["leaks"]] == list(leaks)
    pairs = {kind: {tuple(one): tuple(other) for one, other in report["examples"][kind]} for kind in report["examples"]}
    assert pairs == {"train": repeats, "val_in_train": leaks}
    assert (report["dataset"], report["manifest"]) == ("small", manifest.digest)
    assert summarise(store, "small", manifest).model_dump(mode="json")["audit"] == report


def test_a_report_is_computed_once_for_the_same_items(built: Built) -> None:
    config, store, manifest = built
    without = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"hellaswag": ""})})
    report = json.loads(store.read(DatasetKeys("small").leaks(manifest.digest)).body)
    key = DatasetKeys("small").shard(manifest.shard_ids[-1])
    whole = bytes(store.read(key).body)
    flip_bit(store, key, 2)
    assert find_leaks_of_newest(config).model_dump(mode="json") == report  # no shard was read
    with pytest.raises(ShardCorrupt, match=manifest.shard_ids[-1]):
        find_leaks_of_newest(without)
    assert summarise(store, "small", manifest).model_dump(mode="json")["audit"] == report
    overwrite(store, key, whole)
    other = find_leaks_of_newest(without).model_dump(mode="json")
    assert other == report | {"asked": None, "items": None}
    assert summarise(store, "small", manifest).model_dump(mode="json")["audit"] == other
