"""gpt2 import and gpt2 export: a model of transformers comes in, is evaluated as it is, and goes out again."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from flows.console import cli
from model.checkpoints.records import WEIGHTS, checkpoints
from model.config import RunConfig
from model.config_file import load_config
from model.data.loader import DataLoader
from storage.datasets.manifest import Manifest
from storage.keys import RunKeys
from storage.stores.opening import open_store
from storage.stores.store import Store, read_json
from tests.making import document, tiny_config, write_parquet

PRESETS = Path(__file__).parents[3] / "deploy" / "configs"


class Said(NamedTuple):
    """What a command ended with, and what it printed."""

    code: object
    out: str
    err: str


Gpt2 = Callable[..., Said]


@pytest.fixture
def gpt2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Gpt2:
    """A function that runs the console in this process."""

    def run(*words: str) -> Said:
        monkeypatch.setattr(sys, "argv", ["gpt2", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Said(ended.value.code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published") / "gpt2"
    torch.manual_seed(3)
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=32)).save_pretrained(folder)
    return folder


def settings(config: RunConfig, *more: str) -> list[str]:
    """The configuration as it is written after --set."""
    words = list(more)
    for section, value in config.model_dump(mode="json", exclude_defaults=True).items():
        fields = (
            {f"{section}.{name}": one for name, one in value.items()} if isinstance(value, dict) else {section: value}
        )
        words = [f"{name}={json.dumps(one)}" for name, one in fields.items()] + words
    return [word for setting in words for word in ("--set", setting)]


def val_loss_of_transformers(store: Store, manifest: Manifest, folder: Path) -> float:
    loader = DataLoader(store, "small", manifest, "val", sequence_tokens=32, seed=0)
    windows_NT = torch.from_numpy(loader.windows_in_file_order(np.arange(loader.order.epoch_windows)).astype(np.int64))
    with torch.no_grad():
        logits_NTV = AutoModelForCausalLM.from_pretrained(folder)(windows_NT[:, :-1]).logits
    return F.cross_entropy(logits_NTV.flatten(0, 1), windows_NT[:, 1:].flatten()).item()


def test_an_imported_model_is_evaluated_and_exported_as_it_was(
    api: str, gpt2: Gpt2, build: Callable[[RunConfig], Manifest], published: Path, tmp_path: Path
) -> None:
    for index in range(2):  # documents that are long enough for the completion set
        texts = [document(index * 40 + number, 90) for number in range(40)]
        write_parquet(tmp_path / "source" / f"file_{index}.parquet", texts)
    config = tiny_config(str(tmp_path / "store"), str(tmp_path / "source" / "*.parquet"))
    manifest = build(config)
    words = settings(config, "name=imported")
    came = gpt2("import", str(published), *words)
    assert came.code == 0, came
    for named in (str(published), "imported", "gpt2 evaluate", "gpt2 generate", "train.start_from=imported"):
        assert named in came.out
    again = gpt2("import", str(published), *words)
    assert again.code == 2
    assert "--set name=" in again.err
    evaluated = gpt2("evaluate", *words)
    assert evaluated.code == 0, evaluated
    assert "0 steps\n" in evaluated.out
    store = open_store(config.store_url)
    assert read_json(store, RunKeys("imported").config) is None  # only a training pins
    found = read_json(store, RunKeys("imported").evaluation(0, "val_loss"))
    assert found is not None
    assert found["data"] == manifest.digest
    expected = val_loss_of_transformers(store, manifest, published)
    assert found["metrics"]["val_loss_t32"] == pytest.approx(expected, rel=1e-5, abs=0)  # type: ignore[index,call-overload]
    assert store.stat(RunKeys("imported").report("html")).size > 0
    assert gpt2("gc", *words).code == 0
    assert gpt2("status", *words).code in (0, None)
    went = gpt2("export", str(tmp_path / "out"), *words)
    assert went.code == 0, went
    assert "step 0 of run imported" in went.out
    assert (tmp_path / "out" / WEIGHTS).stat().st_size > 0
    theirs, ours = (AutoModelForCausalLM.from_pretrained(folder) for folder in (published, tmp_path / "out"))
    assert all(torch.equal(weight, ours.state_dict()[name]) for name, weight in theirs.state_dict().items())


def test_an_export_into_a_folder_that_holds_something_is_refused(
    gpt2: Gpt2, config: RunConfig, published: Path
) -> None:
    assert gpt2("import", str(published), *settings(config)).code == 0
    refused = gpt2("export", str(published), *settings(config))
    assert refused.code == 2
    assert str(published) in refused.err


def test_a_model_of_another_shape_is_refused_with_settings_that_fit(
    gpt2: Gpt2, config: RunConfig, published: Path
) -> None:
    refused = gpt2("import", str(published), *settings(config, "model.layers=3", "model.heads=4"))
    assert refused.code == 2
    for named in ("model.layers=1", "model.heads=2", "model.width=16", "layers is 1, asked for 3"):
        assert named in refused.err
    given = refused.err.split("Give the shape that it has: ")[1].split()
    assert gpt2("import", str(published), *settings(config, "model.layers=3", "model.heads=4"), *given).code == 0


@pytest.mark.parametrize("preset", ["gpt2-medium", "gpt2-large", "gpt2-xl"])
def test_a_published_shape_is_refused_with_the_preset_that_has_it(
    gpt2: Gpt2, config: RunConfig, preset: str, tmp_path: Path
) -> None:
    shape = load_config(PRESETS / f"{preset}.toml", []).model
    GPT2Config(
        n_layer=shape.layers, n_head=shape.heads, n_embd=shape.width, n_positions=shape.context_tokens
    ).save_pretrained(tmp_path / "folder")
    refused = gpt2("import", str(tmp_path / "folder"), *settings(config))
    assert refused.code == 2
    assert f"--config {PRESETS / preset}.toml" in refused.err
    assert refused.err.count("--config") == 1


def test_what_cannot_be_imported_leaves_no_run(gpt2: Gpt2, config: RunConfig, tmp_path: Path) -> None:
    refused = gpt2("import", str(tmp_path / "none-such"), *settings(config))
    assert refused.code == 2
    assert "none-such" in refused.err
    assert not Path(config.store_url).exists()


def test_a_model_that_is_asked_for_in_another_shape_is_not_evaluated(
    api: str, gpt2: Gpt2, config: RunConfig, build: Callable[[RunConfig], Manifest], published: Path
) -> None:
    build(config)
    assert gpt2("import", str(published), *settings(config)).code == 0
    refused = gpt2("evaluate", *settings(config, "model.layers=2"))
    assert refused.code == 2
    assert "layers is 1, asked for 2" in refused.err
    store = open_store(config.store_url)
    assert read_json(store, RunKeys(config.name).config) is None
    assert len(checkpoints(store, config.name)) == 1
