"""gpt2 import and gpt2 export: a transformers model is imported, evaluated and exported without a change."""

import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from flows.console import cli, pipeline
from model.checkpoints.records import WEIGHTS, checkpoints
from model.config import RunConfig
from model.runs.run import find_run
from storage.datasets.manifest import Manifest
from storage.keys import RunKeys
from storage.loading.windows import Windows
from storage.stores.opening import open_store
from storage.stores.store import Store
from tests.making import document, read_json, tiny_config, write_parquet


class Ended(NamedTuple):
    """A command's exit code and output."""

    code: object
    out: str
    err: str


Gpt2 = Callable[..., Ended]


@pytest.fixture
def gpt2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Gpt2:
    """Runs the console in this process."""

    def run(*argv: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["gpt2", *argv])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return Ended(caught.value.code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published") / "gpt2"
    torch.manual_seed(3)
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=32)).save_pretrained(folder)
    return folder


def options(config: RunConfig, *overrides: str) -> list[str]:
    """The --set options that give this configuration, then the overrides."""
    fields: dict[str, Any] = {}
    for section, value in config.model_dump(mode="json", exclude_defaults=True).items():
        nested = {f"{section}.{name}": entry for name, entry in value.items()} if isinstance(value, dict) else {}
        fields |= nested or {section: value}
    settings = [f"{name}={json.dumps(value)}" for name, value in fields.items()]
    return [word for setting in [*settings, *overrides] for word in ("--set", setting)]


def val_loss_of_transformers(store: Store, manifest: Manifest, folder: Path) -> float:
    loader = Windows(store, "small", manifest, "val", sequence_tokens=32, seed=0)
    windows_NT = torch.from_numpy(loader.read_in_file_order(np.arange(loader.order.epoch_windows)).astype(np.int64))
    with torch.no_grad():
        logits_NTV = AutoModelForCausalLM.from_pretrained(folder)(windows_NT[:, :-1]).logits
    return F.cross_entropy(logits_NTV.flatten(0, 1), windows_NT[:, 1:].flatten()).item()


@pytest.mark.full
def test_an_imported_model_is_evaluated_and_exported_unchanged(
    api: str, gpt2: Gpt2, build: Callable[[RunConfig], Manifest], published: Path, tmp_path: Path
) -> None:
    for index in range(2):  # documents long enough for the completion set
        texts = [document(index * 40 + number, 90) for number in range(40)]
        write_parquet(tmp_path / "source" / f"file_{index}.parquet", texts)
    config = tiny_config(str(tmp_path / "store"), str(tmp_path / "source" / "*.parquet"))
    manifest = build(config)
    argv = ["imported", *options(config, "name=imported")]
    imported = gpt2("import", str(published), *argv)
    assert imported.code == 0, imported
    for text in (str(published), "imported", "gpt2 evaluate", "gpt2 generate", "train.start_from=imported"):
        assert text in imported.out
    repeated = gpt2("import", str(published), *argv)
    assert repeated.code == 2
    assert "another name" in repeated.err
    evaluated = gpt2("evaluate", *argv)
    assert evaluated.code == 0, evaluated
    assert "0 steps\n" in evaluated.out
    store = open_store(config.store_url)
    assert read_json(store, RunKeys("imported").config) is None  # only training pins a run
    result = read_json(store, RunKeys("imported").evaluation(0, "val_loss"))
    assert result is not None
    assert result["data"] == manifest.digest
    expected = val_loss_of_transformers(store, manifest, published)
    assert result["metrics"]["val_loss_t32"] == pytest.approx(expected, rel=1e-5, abs=0)  # type: ignore[index,call-overload]
    assert store.stat(RunKeys("imported").report("html")).size > 0
    assert gpt2("gc", *argv[1:]).code == 0
    assert gpt2("status", *argv).code in (0, None)
    exported = gpt2("export", *argv, "--to", str(tmp_path / "out"))
    assert exported.code == 0, exported
    assert "step 0 of run imported" in exported.out
    assert (tmp_path / "out" / WEIGHTS).stat().st_size > 0
    theirs, ours = (AutoModelForCausalLM.from_pretrained(folder) for folder in (published, tmp_path / "out"))
    assert all(torch.equal(weight, ours.state_dict()[name]) for name, weight in theirs.state_dict().items())


def test_an_export_to_a_folder_that_is_not_empty_is_refused(gpt2: Gpt2, config: RunConfig, published: Path) -> None:
    assert gpt2("import", str(published), "tiny", *options(config)).code == 0
    refused = gpt2("export", "--to", str(published), *options(config))
    assert refused.code == 2
    assert str(published) in refused.err
    refused = gpt2("export", "--to", "s3://bucket/out", *options(config))
    assert (refused.code, "only a folder on this host" in refused.err, Path("s3:").exists()) == (2, True, False)


def test_a_model_of_another_shape_than_the_settings_is_refused(gpt2: Gpt2, config: RunConfig, published: Path) -> None:
    refused = gpt2("import", str(published), "tiny", *options(config, "model.layers=3", "model.heads=4"))
    assert refused.code == 2
    assert re.search(r"model\.layers\D*1\D*3", refused.err)


def test_an_imported_model_needs_no_settings_of_its_shape_and_the_printed_commands_work(
    gpt2: Gpt2, config: RunConfig, published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_store = ["--set", f"store_url={config.store_url}"]
    imported = gpt2("import", str(published), "theirs", *in_store)
    assert imported.code == 0, imported
    evaluated: list[RunConfig] = []
    monkeypatch.setattr(pipeline, "run_flow", lambda _, config, __: evaluated.append(config))
    monkeypatch.setattr(pipeline, "_print_summary", lambda *_: None)
    [command] = re.findall(r"gpt2 (evaluate .*)", imported.out)
    for argv in (shlex.split(command), ["evaluate", *in_store]):  # it is the only run of the store
        assert gpt2(*argv).code == 0
        assert evaluated[-1].name == "theirs"
        assert evaluated[-1].model.model_dump() == checkpoints(open_store(config.store_url), "theirs")[0].model
        assert evaluated[-1].train.sequence_tokens == 32
    [command] = re.findall(r"gpt2 (train .*)", imported.out)
    trained = gpt2(*shlex.split(command))
    assert (trained.code, "gpt2 dataset build" in trained.err) == (2, True)  # all that is missing


def test_a_start_from_another_shape_is_refused_before_a_server_starts(
    gpt2: Gpt2, config: RunConfig, published: Path
) -> None:
    assert gpt2("import", str(published), "parent", "--set", f"store_url={config.store_url}").code == 0
    refused = gpt2("pretrain", *options(config, "train.start_from=parent", "model.layers=2"))
    assert (refused.code, refused.out) == (2, "")
    assert re.search(r"'parent'.*model\.layers is 1, not 2", refused.err)
    assert find_run(open_store(config.store_url), config.name) is None


def test_a_failed_import_creates_no_store(gpt2: Gpt2, config: RunConfig, tmp_path: Path) -> None:
    refused = gpt2("import", str(tmp_path / "none-such"), "tiny", *options(config))
    assert refused.code == 2
    assert "none-such" in refused.err
    assert not Path(config.store_url).exists()


def test_a_run_is_not_evaluated_with_another_shape(
    api: str, gpt2: Gpt2, config: RunConfig, build: Callable[[RunConfig], Manifest], published: Path
) -> None:
    build(config)
    assert gpt2("import", str(published), "tiny", *options(config)).code == 0
    refused = gpt2("evaluate", *options(config, "model.layers=2"))
    assert refused.code == 2
    assert re.search(r"layers\D*1\D*2", refused.err)
    store = open_store(config.store_url)
    assert read_json(store, RunKeys(config.name).config) is None
    assert len(checkpoints(store, config.name)) == 1
