"""Corpora of the Hub as they are published: the shipped configurations, and refreshes as crawls come and go."""

from collections.abc import Callable
from pathlib import Path

import pytest

from model.config import RunConfig
from model.config_file import load_config
from storage.datasets.manifest import Manifest
from storage.datasets.plan import ShardJob
from storage.datasets.shards import build_shard, read_shard
from storage.datasets.versions import difference
from storage.sources.hub import list_files
from storage.stores.opening import open_store
from tests.corpora import encoded
from tests.hub import Hub, Repository
from tests.making import build_dataset, document, tiny_config

CONFIGS = Path(__file__).parents[3] / "model" / "presets"
TEXTS = [document(number, 20) for number in range(90)]
PARQUET, GZ, ZST = (
    list(encoded(TEXTS, *kind).values()) for kind in (("parquet",), ("jsonl", ".gz"), ("jsonl", ".zst"))
)
CRAWLS = [f"CC-MAIN-2025-{week}" for week in ("05", "08", "13")]
SAMPLE = (
    {"sample-10BT": {"train": "sample/10BT/*"}},
    PARQUET,
    [f"sample/10BT/{at:03d}_00000.parquet" for at in range(3)],
)
C4 = {"en": {"train": "en/c4-train.*.json.gz", "validation": "en/c4-validation.*.json.gz"}}
DCLM = "global-shard_0{}_of_10/local-shard_0_of_10/shard_00000000_processed.jsonl.zst"
LAYOUTS: dict[str, tuple[str, dict[str, dict[str, str]], list[bytes], list[str]]] = {
    # the source, the configurations of its card, and three files with their names
    "gpt2-124m": ("HuggingFaceFW/fineweb-edu", *SAMPLE),
    "fineweb": ("HuggingFaceFW/fineweb", *SAMPLE),
    "fineweb-edu-newest": (
        "HuggingFaceFW/fineweb-edu",
        {crawl: {"train": f"data/{crawl}/*"} for crawl in CRAWLS},
        PARQUET,
        [f"data/{crawl}/train-00000-of-00001.parquet" for crawl in CRAWLS],
    ),
    "c4": ("allenai/c4", C4, GZ, [f"en/c4-train.{at:05d}-of-01024.json.gz" for at in range(3)]),
    "dclm": ("mlfoundations/dclm-baseline-1.0", {}, ZST, [DCLM.format(number) for number in (1, 2, 3)]),
    "climbmix": ("karpathy/climbmix-400b-shuffle", {}, PARQUET, [f"shard_{at:05d}.parquet" for at in range(3)]),
}


def stream_of(config: RunConfig, manifest: Manifest) -> bytes:
    store, dataset = open_store(config.store_url), config.data.dataset
    return b"".join(read_shard(store, dataset, row) for row in manifest.rows())


@pytest.mark.parametrize("preset", LAYOUTS)
def test_a_shipped_configuration_builds_the_corpus_that_it_names(tmp_path: Path, hub: Hub, preset: str) -> None:
    source, configs, bodies, names = LAYOUTS[preset]
    others = {"en/c4-validation.00000-of-00008.json.gz": GZ[0]} if preset == "c4" else {}
    hub.dataset(source, dict(zip(names, bodies, strict=True)) | others, configs=configs)
    small = [
        f"store_url={tmp_path}/store",
        "data.shard_tokens=600",
        "data.val_shards=1",
        "data.keep_val_duplicates=true",
    ]
    config = load_config(CONFIGS / f"{preset}.toml", small)
    assert config.data.source == source
    manifest = build_dataset(config)
    (tmp_path / "texts.jsonl").write_bytes(encoded(TEXTS, "jsonl", files=1)["part-00000.jsonl"])
    local = tiny_config(str(tmp_path / "local"), f"{tmp_path}/texts.jsonl", *small[1:])
    assert stream_of(config, manifest) == stream_of(local, build_dataset(local))


# Newest crawls


def crawl(number: int) -> dict[str, bytes]:
    """One crawl of two files, and its name."""
    texts = [document(number * 1_000 + row, 20) for row in range(60)]
    name = f"CC-MAIN-20{20 + number // 50}-{number % 50:02d}"
    return {
        f"data/{name}/train-{part}.parquet": body
        for part, body in enumerate(encoded(texts, "parquet", files=2).values())
    }


def publish(hub: Hub, *numbers: int) -> Repository:
    """Make these crawls the newest commit of org/edu, beside a sample that is no crawl."""
    files = {name: body for number in numbers for name, body in crawl(number).items()}
    names = sorted({name.split("/")[1] for name in files})
    files["sample/10BT/000.parquet"] = PARQUET[0]
    card = {
        "configs": {name: {"train": f"data/{name}/*"} for name in names} | {"sample-10BT": {"train": "sample/10BT/*"}}
    }
    if "org/edu" in hub.repositories:
        hub.repositories["org/edu"].card |= card
        hub.repositories["org/edu"].commit(files)
    else:
        hub.dataset("org/edu", files, **card)
    return hub.repositories["org/edu"]


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The source files of the shard jobs that were run."""
    names = list[str]()

    def count(store: object, dataset: str, job: ShardJob, *rest: object) -> object:
        names.append(job.source.name)
        return build_shard(store, dataset, job, *rest)  # type: ignore[arg-type]  # what `building` gives

    monkeypatch.setattr("storage.datasets.building.build_shard", count)
    return names


@pytest.fixture
def refresh(tmp_path: Path) -> Callable[[str], Manifest]:
    def run(config: str = "newest:2") -> Manifest:
        return build_dataset(
            tiny_config(f"{tmp_path}/store", "org/edu", f"data.config={config}", "data.shard_tokens=600")
        )

    return run


def test_a_refresh_builds_only_the_crawls_that_are_new(
    hub: Hub, built: list[str], refresh: Callable[[], Manifest]
) -> None:
    publish(hub, 1, 2, 3)
    first = refresh()
    assert first.origin["configs"] == "CC-MAIN-2020-02, CC-MAIN-2020-03"
    assert set(built) == {*crawl(2), *crawl(3)} == set(first.files)
    built.clear()
    assert refresh() == first
    assert built == []

    publish(hub, 1, 2, 3, 54)  # a crawl of the next year
    second = refresh()
    assert second.origin["configs"] == "CC-MAIN-2020-03, CC-MAIN-2021-04"
    assert set(built) == {*crawl(54)}
    assert set(second.files) == {*crawl(3), *crawl(54)}
    val = {row.shard_id for row in first.rows("val")}
    assert {row.shard_id for row in second.rows("val")} == val  # although their crawl left
    kept = {row.shard_id for row in first.rows("train")} & set(second.shard_ids)
    assert {row.shard_id for row in first.rows("train")} - kept  # the crawl that left
    change = difference(first, second)
    assert (change.configs.added, change.configs.removed) == (["CC-MAIN-2021-04"], ["CC-MAIN-2020-02"])
    assert change.files.removed == sorted(crawl(2))

    built.clear()
    publish(hub, 1, 2, 3)  # withdrawn
    assert refresh().columns == first.columns
    assert built == []


def test_the_newest_are_chosen_by_date_whatever_their_names(hub: Hub) -> None:
    names = ["CC-MAIN-2025-05", "WEB-2024-10", "sample"]
    files = {f"data/{name}/a.parquet": PARQUET[0] for name in names}
    repository = hub.dataset("org/edu", files, configs={name: {"train": f"data/{name}/*"} for name in names})
    for config, chosen in (("newest:1", "CC-MAIN-2025-05"), ("newest:9", "WEB-2024-10, CC-MAIN-2025-05")):
        assert list_files("org/edu", config, *repository.commits, "train").origin == {"configs": chosen}


def test_a_glob_follows_the_crawls_of_a_year(hub: Hub, refresh: Callable[[str], Manifest]) -> None:
    publish(hub, 1, 51, 52)
    assert refresh("CC-MAIN-2021-*").origin["configs"] == "CC-MAIN-2021-01, CC-MAIN-2021-02"


@pytest.mark.parametrize(
    ("config", "facts"),
    [
        ("CC-MAIN-2019-*", ["4 configurations", "CC-MAIN-2020-01"]),
        ("sampel-*", ["sample-10BT"]),
        ("newest:0", ["newest:3"]),
        ("newest:many", ["newest:3"]),
    ],
)
def test_a_pattern_without_a_configuration_names_the_nearest(
    hub: Hub, refresh: Callable[[str], Manifest], config: str, facts: list[str]
) -> None:
    publish(hub, 1, 2, 3)
    with pytest.raises(ValueError, match=r"data\.config = .*org/edu") as error:
        refresh(config)
    assert all(fact in str(error.value) for fact in facts)


def test_the_newest_of_a_dataset_without_crawls_is_refused(hub: Hub, refresh: Callable[[], Manifest]) -> None:
    hub.dataset("org/edu", {"data/a.parquet": PARQUET[0]})
    with pytest.raises(ValueError, match=r"none of its 1 configurations matches.*default"):
        refresh()
