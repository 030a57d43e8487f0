"""The dataset that all trainings share, and the undisturbed runs that other runs must equal."""

from collections.abc import Callable
from functools import cache

import pytest

from storage.sources import reading
from storage.stores.opening import open_store
from tests.making import build_dataset, document, tiny_config, write_parquet
from tests.model.training_runs import StoredDataset, training


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> StoredDataset:
    folder = tmp_path_factory.mktemp("dataset")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "REMEMBERED", folder / "digests")
        for index in range(2):
            texts = [document(index * 40 + number) for number in range(40)]
            write_parquet(folder / "source" / f"file_{index}.parquet", texts)
        store = open_store(str(folder / "store"), create=True)
        source = str(folder / "source" / "*.parquet")
        return StoredDataset(store, source, build_dataset(tiny_config(store.url, source)))


@pytest.fixture(scope="session")
def undisturbed(dataset: StoredDataset, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], str]:
    """A function that trains a run on this number of ranks, without interruption. Returns its name."""

    @cache
    def trained(ranks: int) -> str:
        run = f"undisturbed-{ranks}"
        with training(dataset.store, dataset.put_job(run), ranks, tmp_path_factory.mktemp(run)) as process:
            assert process.wait() == 0, process.output()
        return run

    return trained
