"""Source files with the columns of a crawl (id, url, dump, score), and the expected contents of their dataset.

The expectation is computed from the rows in plain Python. It shares no code with plans, records and shards.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from model import tokenizer
from model.config import RunConfig
from storage.datasets.manifest import Manifest
from storage.keys import DatasetKeys
from storage.stores.opening import open_store
from storage.stores.store import Store
from tests.making import WORDS, build_dataset, tiny_config

DUMPS = ("CC-MAIN-2024-10", None, "CC-MAIN-2021-04", "CC-MAIN-2024-10", "CC-MAIN-2013-20")
FILTERS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "int_score >= 2": lambda row: row["int_score"] >= 2,
    "length >= 150": lambda row: row["text"] is not None and len(row["text"]) >= 150,
}
GOOD, LONG = (f'data.filters=["{text}"]' for text in FILTERS)
SKIPPING = "data.on_bad_document=skip"
BARE = "data.text_column=body"  # for files that have no other column


class Kept(NamedTuple):
    """A row that passes the filters: its source file's name, its row number, and its columns."""

    source: str
    row: int
    columns: dict[str, Any]

    @property
    def text(self) -> Any:
        """The document, or None for a bad row."""
        return self.columns["body" if "body" in self.columns else "text"]

    @property
    def ids(self) -> list[int]:
        """Its tokens in a shard."""
        return [tokenizer.EOT, *tokenizer.encode(self.text).tolist()]


def crawled(file: int, number: int, *, bad: bool = False) -> dict[str, Any]:
    """A row. Texts differ and their lengths span several powers of two; with `bad`, some rows have no text."""
    chosen = [WORDS[(file + number * 7 + place * place) % len(WORDS)] for place in range(1 + number * 37 % 120)]
    return {
        "id": f"<urn:{file}:{number}>",
        "text": None if bad and number % 9 == 4 else f"Page {number} of {file}: żółć " + " ".join(chosen),
        "url": f"https://example.org/{file}/{number}",
        "dump": DUMPS[number % len(DUMPS)],
        "int_score": number % 7,
    }


def write_crawl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write the rows as parquet with several row groups, or as JSON lines with blank lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    else:
        path.write_text("".join(json.dumps(row) + "\n" + "\n" * (number % 3) for number, row in enumerate(rows)))
    return path


class Crawl:
    """Source files with their rows, and the configuration and store of their dataset."""

    def __init__(
        self,
        folder: Path,
        *settings: str,
        kind: str = "parquet",
        names: tuple[str, ...] = ("file_0", "file_1"),
        count: int = 40,
        bad: bool = False,
    ) -> None:
        self.source = folder / "source"
        self.config: RunConfig = tiny_config(str(folder / "store"), f"{self.source}/**/*.{kind}", *settings)
        self.store: Store = open_store(self.config.store_url, create=True)
        self.rows: dict[str, list[dict[str, Any]]] = {}
        for file, name in enumerate(names):
            rows = [crawled(file, number, bad=bad) for number in range(count)]
            self.write(f"{name}.{kind}", [{"body": row["text"]} for row in rows] if BARE in settings else rows)

    def write(self, name: str, rows: list[dict[str, Any]] | None) -> None:
        """Write the file with these rows; None deletes it."""
        if rows is None:
            del self.rows[name]
            (self.source / name).unlink()
        else:
            self.rows[name] = rows
            write_crawl(self.source / name, rows)

    def build(self) -> Manifest:
        """Build the missing shards and seal the dataset."""
        return build_dataset(self.config)

    def kept(self) -> list[Kept]:
        """The documents that the dataset must hold, in order."""
        return [row for row in self._filtered() if row.text is not None]

    def skipped(self) -> list[Kept]:
        """The rows that pass the filters and have no text."""
        return [row for row in self._filtered() if row.text is None]

    def _filtered(self) -> list[Kept]:
        filters = [FILTERS[text] for text in self.config.data.filters]
        return [
            Kept(Path(name).name, number, row)
            for name, rows in sorted(self.rows.items())
            for number, row in enumerate(rows)
            if all(keeps(row) for keeps in filters)
        ]

    def shard_documents(self, manifest: Manifest) -> dict[str, list[Kept]]:
        """The documents of each shard of a first version. The manifest gives only their number."""
        kept, documents = iter(self.kept()), {}
        for shard in manifest.rows():
            documents[shard.shard_id] = [next(kept) for _ in range(shard.documents)]
        assert next(kept, None) is None
        return documents

    def ids(self, manifest: Manifest, split: str) -> np.ndarray:
        """The tokens of a split in order, read from the files of its shards."""
        names = [DatasetKeys(self.config.data.dataset).shard(row.shard_id) for row in manifest.rows(split)]
        return np.concatenate([np.fromfile(str(self.store.local_path(name)), "<u2") for name in names])
