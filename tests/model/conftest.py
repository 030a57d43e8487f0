"""A dataset that all trainings of the tests share, and the undisturbed runs that the others are held against."""

from collections.abc import Callable
from functools import cache

import pytest

from storage.sources import identity
from storage.stores.opening import open_store
from tests.making import build_dataset, document, tiny_config, write_parquet
from tests.model.training_runs import House, training


@pytest.fixture(scope="session")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    folder = tmp_path_factory.mktemp("house")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(identity, "REMEMBERED", folder / "digests")
        for index in range(2):
            texts = [document(index * 40 + number) for number in range(40)]
            write_parquet(folder / "source" / f"file_{index}.parquet", texts)
        store = open_store(str(folder / "store"), create=True)
        source = str(folder / "source" / "*.parquet")
        return House(store, source, build_dataset(tiny_config(store.url, source)))


@pytest.fixture(scope="session")
def undisturbed(house: House, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], str]:
    """The name of a run that so many ranks trained from its first to its last step, in processes of their own."""

    @cache
    def trained(ranks: int) -> str:
        run = f"undisturbed-{ranks}"
        with training(house.store, house.ask(run), ranks, tmp_path_factory.mktemp(run)) as process:
            assert process.wait() == 0, process.said()
        return run

    return trained
