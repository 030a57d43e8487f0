"""The options that make up a configuration, and what a run or dataset of the store remembers of it."""

import shlex
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from flows.inspection.status import dataset_names, run_names
from model.config import RunConfig
from model.config_file import PRESETS, config_of, load_config
from model.form import DEFAULT
from model.runs.run import stored_dataset_settings, stored_settings
from storage.errors import ObjectMissing
from storage.stores.opening import open_store
from storage.stores.store import Store

FILE = "A TOML file with settings, or a preset such as demo. gpt2 settings lists presets and settings."
SET = "Override one setting (repeatable): train.max_steps=200. Text is as typed, or in TOML quotes; lists are TOML."

RunName = Annotated[str | None, Parameter(help="A run (default: the only run in the store).")]
DatasetName = Annotated[str | None, Parameter(help="A dataset (default: the only dataset in the store).")]
Names = Callable[[Store], list[str]]
Stored = Callable[[Store, str], dict[str, Any] | None]


@Parameter("*")
@dataclass(frozen=True)
class Settings:
    """The options that make up the configuration."""

    file: Annotated[Path | None, Parameter(["--config", "-c"], help=FILE)] = None
    overrides: Annotated[tuple[str, ...], Parameter(["--set", "-s"], help=SET)] = ()

    def new(self, name: str | None = None) -> RunConfig:
        """The configuration of a new run: the file or the defaults, then --set."""
        return load_config(self.file, [*self.overrides, *_named("name", name)])

    def run(self, name: str | None = None) -> RunConfig:
        """The configuration of a run: --config, or what the store remembers of the run; then --set.

        Without a name, takes the only run of the store. Raises ValueError, which lists them, if there are several.
        """
        return self._load("run", "name", name, partial(run_names, requested=True), stored_settings)

    def dataset(self, name: str | None = None) -> RunConfig:
        """The same for a dataset."""
        return self._load("dataset", "data.dataset", name, dataset_names, stored_dataset_settings)

    def opened(self, name: str | None = None) -> tuple[Store, str]:
        """The store of a dataset, and the dataset's name."""
        config = self.dataset(name)
        return open_store(config.store_url), config.data.dataset

    def store(self) -> Store:
        """The store. Raises StorageError if it cannot be opened."""
        return open_store(load_config(self.file, _of(self.overrides, "store_url")).store_url)

    @property
    def preset(self) -> str:
        """The preset that --config names, else the default."""
        return str(self.file) if (PRESETS / f"{self.file}.toml").is_file() else DEFAULT

    def command(self, verb: str, *overrides: str) -> str:
        """The shell command that runs a verb with the same configuration and these overrides."""
        file = ["--config", str(self.file)] if self.file else []
        settings = [word for override in (*self.overrides, *overrides) for word in ("--set", override)]
        return shlex.join(["gpt2", *verb.split(), *file, *settings])

    def _load(self, kind: str, setting: str, name: str | None, names: Names, stored: Stored) -> RunConfig:
        overrides = [*self.overrides, *_named(setting, name)]
        if self.file is not None:
            return load_config(self.file, overrides)
        given = _of(overrides, setting)
        known = [str(attrgetter(setting)(load_config(None, given)))] if given else []
        with suppress(ObjectMissing):  # the verb itself says so, or creates the store
            store = self.store()
            known = known or names(store)
            if len(known) > 1:
                raise ValueError(f"store {store.url!r} has several {kind}s: {', '.join(known)}. Name one of them.")
            if known and (values := stored(store, known[0])):
                return config_of(values | {"store_url": store.url}, overrides)
        return load_config(None, [*_named(setting, *known), *overrides])


DEFAULTS = Settings()


def _named(setting: str, name: str | None = None) -> list[str]:
    return [f"{setting}={name}"] if name else []


def _of(overrides: Iterable[str], setting: str) -> list[str]:
    return [override for override in overrides if override.partition("=")[0].strip() == setting]
