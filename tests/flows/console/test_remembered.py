"""What the store remembers: the only run or dataset, and the settings of an existing one."""

import subprocess
from pathlib import Path
from typing import Any

import pytest

from flows.console import dataset, pipeline
from flows.console.settings import Settings
from model.config import RunConfig
from model.runs.run import keep_request, pin_run
from storage.digests import canonical_json
from storage.keys import DatasetKeys, RunKeys
from storage.stores.store import Store, overwrite
from tests.conftest import BuildDataset
from tests.flows.in_process import Gpt2
from tests.making import read_json


def requested(store: Store, config: RunConfig, name: str) -> RunConfig:
    """A run of that name that was requested, with a dataset of the same name."""
    config = config.model_copy(update={"name": name, "data": config.data.model_copy(update={"dataset": name})})
    keep_request(store, RunKeys(name).request, config)
    keep_request(store, DatasetKeys(name).request, config)
    return config


def settings(store: Store, *overrides: str) -> Settings:
    return Settings(None, (f"store_url={store.url}", *overrides))


@pytest.mark.parametrize("verb", [["evaluate"], ["generate", "--prompt", "a"], ["dataset", "show"], ["report"]])
def test_several_names_are_listed_for_a_verb_without_one(
    gpt2: Gpt2, store: Store, config: RunConfig, verb: list[str]
) -> None:
    for name in ("first", "second"):
        requested(store, config, name)
    outcome = gpt2(*verb, "--set", f"store_url={store.url}")
    assert (outcome.code, "first, second" in outcome.error) == (2, True), outcome


@pytest.mark.parametrize(
    ("verb", "remedy"),
    [
        (["evaluate"], "gpt2 train"), (["dataset", "show"], "gpt2 dataset build"), (["report"], "gpt2-124m"),
        (["retry"], "gpt2 status"), (["stop"], "--detach"), (["logs"], "--detach"), (["train"], "gpt2 dataset build"),
    ],
)  # fmt: skip
def test_an_empty_store_is_answered_with_what_to_do(gpt2: Gpt2, store: Store, verb: list[str], remedy: str) -> None:
    outcome = gpt2(*verb, "--set", f"store_url={store.url}")
    assert (outcome.code, remedy in outcome.error) == (2, True), outcome


@pytest.mark.parametrize("kind", ["request", "pinned"])
def test_the_settings_are_those_of_the_last_request_or_of_the_first_start(
    store: Store, config: RunConfig, kind: str
) -> None:
    if kind == "request":
        pinned = config.model_copy(update={"name": "mine"})
        pin_run(store, config.model_copy(update={"name": "mine"}), "a" * 64, None)
        config = pinned.model_copy(update={"evaluation": config.evaluation.model_copy(update={"samples": 7})})
        keep_request(store, RunKeys("mine").request, config)
    else:
        config = config.model_copy(update={"name": "mine"})
        pin_run(store, config, "a" * 64, None)
    for name in (None, "mine"):
        assert settings(store).run(name) == config
    assert settings(store, "train.seed=9").run().train.seed == 9
    assert settings(store, 'name="mine"').run() == config
    assert settings(store).run("other") == RunConfig(name="other", store_url=store.url)
    assert settings(store, "name=mine").run("other").name == "other"
    assert Settings(Path("demo"), (f"store_url={store.url}",)).run("mine").data.dataset == "python-docs"


def test_the_settings_of_a_dataset_are_those_of_its_last_build(store: Store, config: RunConfig) -> None:
    config = requested(store, config, "mine")
    assert settings(store).dataset() == settings(store).dataset("mine") == config


def test_a_setting_that_was_removed_since_is_ignored(store: Store, config: RunConfig) -> None:
    config = requested(store, config, "mine")
    values: dict[str, Any] = read_json(store, RunKeys("mine").request) or {}
    values["train"]["removed"] = values["removed"] = 1
    overwrite(store, RunKeys("mine").request, canonical_json(values))
    overwrite(store, DatasetKeys("mine").request, canonical_json(values))
    assert settings(store).run() == settings(store).dataset() == config


def test_each_verb_uses_what_is_remembered(
    gpt2: Gpt2, store: Store, config: RunConfig, build: BuildDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Generate, evaluate, trace and build, without any setting but the store."""
    manifest = build(config)
    pin_run(store, config, manifest.digest, None)
    keep_request(store, DatasetKeys("small").request, config)
    in_store = ["--set", f"store_url={store.url}"]
    seen: list[Any] = []
    monkeypatch.setattr(subprocess, "run", lambda argv, **_: seen.append(argv) or subprocess.CompletedProcess(argv, 0))
    assert gpt2("generate", "--prompt", "a", *in_store).code == 0
    [argv] = seen
    assert argv[argv.index("--tokens") + 1] == str(config.evaluation.sample_tokens)
    for module, verb in ((pipeline, ["evaluate"]), (dataset, ["dataset", "audit"])):
        monkeypatch.setattr(module, "run_flow", lambda _, requested, __: seen.append(requested))
        monkeypatch.setattr(pipeline, "check_inputs", lambda *_: None)
        monkeypatch.setattr(pipeline, "_print_summary", lambda *_: None)
        assert gpt2(*verb, *in_store).code == 0
        assert seen.pop() == config
    traced = gpt2("dataset", "trace", "--window", "0", "--json", *in_store)
    assert traced.code == 0
    assert len({line["dataset"] for line in traced.json_lines}) == 1
    assert gpt2("dataset", "build", *in_store).code == 0
    assert seen.pop() == config


def test_a_run_is_extended_under_a_new_name_with_its_own_settings(
    gpt2: Gpt2, store: Store, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    pin_run(store, config, "a" * 64, None)
    seen: list[RunConfig] = []
    monkeypatch.setattr(pipeline, "_pretrain", lambda config, _: seen.append(config))
    in_store = ["--set", f"store_url={store.url}"]
    assert gpt2("pretrain", "longer", "--extend", "tiny", "--set", "train.max_steps=24", *in_store).code == 0
    longer = {"max_steps": 24, "start_from": "tiny", "start_with": "everything"}
    assert seen == [config.model_copy(update={"name": "longer", "train": config.train.model_copy(update=longer)})]
    for verb, fact in (
        (["pretrain", "--extend", "tiny"], "new run needs a name"),
        (["train", "longer", "--extend", "nobody"], "no run 'nobody'"),
    ):
        refused = gpt2(*verb, *in_store)
        assert (refused.code, fact in refused.error) == (2, True), refused


@pytest.mark.parametrize("verb", ["status", "doctor"])
def test_json_is_one_list_with_the_facts_of_the_text(gpt2: Gpt2, store: Store, config: RunConfig, verb: str) -> None:
    requested(store, config, "mine")
    in_store = ["--set", f"store_url={store.url}"]
    [lines] = gpt2(verb, "--json", *in_store).json_lines
    text = gpt2(verb, *in_store).out
    assert lines
    for line in lines:
        assert str(line["what" if verb == "status" else "check"]) in text
        assert str(line["state" if verb == "status" else "detail"])[:20] in text
