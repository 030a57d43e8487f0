"""The report, the status, the trace and the exported model of a mixed run say which datasets it read."""

from itertools import groupby
from pathlib import Path

import numpy as np
import pytest

from flows.console.options import check_inputs
from flows.inspection.garbage import collect
from flows.inspection.status import run_status
from flows.inspection.trace import trace_target, windows
from flows.pages.run_report import write_report
from model.__main__ import run_job
from model.checkpoints.huggingface import export_run
from model.checkpoints.records import checkpoints
from model.config import RunConfig
from model.runs.job import put_job
from model.runs.run import Run, evaluation_jobs, pin_run, training_job
from storage.errors import ObjectMissing
from storage.keys import RunKeys
from storage.loading.windows import MixedWindows, Windows
from storage.sources import reading
from storage.stores.opening import open_store
from storage.stores.store import Store
from tests.making import build_other, tiny_config

SHARES = "code 25 %, small 75 %"
BATCH = 8


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, RunConfig, Run]:
    """A run that was trained and evaluated on a mix. One of its datasets has a newer version since."""
    folder = tmp_path_factory.mktemp("mixed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "REMEMBERED", folder / "digests")
        url = str(folder / "store")
        small, _ = build_other(url, "small", range(40)), build_other(url, "code", range(100, 130))
        overrides = ("name=mixed", 'train.mix=["small:3", "code:1"]', "train.max_steps=2", "train.warmup_steps=0")
        config = tiny_config(url, str(folder / "source-small"), *overrides)
        store = open_store(url)
        run = pin_run(store, config, small.digest, None)
        assert run_job(url, put_job(store, training_job(run))) == 0
        val_loss = evaluation_jobs(config, checkpoints(store, "mixed")[-1], run.manifest, None)[0]
        assert run_job(url, put_job(store, val_loss)) == 0
        build_other(url, "code", range(130, 140))
    return store, config, run


def test_the_report_has_the_shares_the_versions_and_each_val_loss(trained: tuple[Store, RunConfig, Run]) -> None:
    store, _, run = trained
    write_report(store, "mixed")
    for kind in ("html", "md"):
        report = store.read(RunKeys("mixed").report(kind)).body.decode()
        val_losses = ("val_loss_code_t32", "val_loss_small_t32", "val_loss_mix_t32")
        scored_on = " together with ".join(f"{dataset} {share.manifest[:12]}" for dataset, share in run.mix.items())
        for fact in (SHARES, f"data {scored_on}", *val_losses, *(share.manifest for share in run.mix.values())):
            assert fact in report, fact


def test_the_status_and_the_exported_model_have_the_shares(
    trained: tuple[Store, RunConfig, Run], tmp_path: Path
) -> None:
    store, _, run = trained
    assert SHARES in [line.state for line in run_status(store, "mixed")]
    export_run(store, "mixed", tmp_path / "exported")
    card = (tmp_path / "exported" / "README.md").read_text()
    assert all(fact in card for fact in (SHARES, "step 2", *(share.manifest for share in run.mix.values())))


def test_each_document_of_a_step_is_traced_to_its_dataset(trained: tuple[Store, RunConfig, Run]) -> None:
    store, config, run = trained
    traced = list(windows(store, trace_target(store, config), "train", BATCH, BATCH))
    of_window = [[document for _, document in parts] for _, parts in groupby(traced, lambda part: part[0])]
    datasets = [{document.dataset for document in documents} for documents in of_window]
    assert (datasets.count({"code"}), datasets.count({"small"})) == (2, 6)
    assert all(document.row is not None for _, document in traced)
    mixed = MixedWindows(store, run.mix, "train", sequence_tokens=32, seed=config.train.seed)
    tokens = [np.concatenate([document.ids for document in documents]) for documents in of_window]
    assert np.array_equal(tokens, mixed.read(BATCH, BATCH))
    target = trace_target(store, config)
    val = Windows(store, "small", target.manifest, "val", sequence_tokens=32, seed=config.train.seed)
    in_val = [document for _, document in windows(store, target, "val", 0, 4)]  # of `data.dataset`, in file order
    assert {document.dataset for document in in_val} == {"small"}
    tokens = np.concatenate([document.ids for document in in_val])
    assert np.array_equal(tokens, val.read_in_file_order(np.arange(4)).ravel())


def test_a_command_checks_the_mix_before_it_starts_a_server(trained: tuple[Store, RunConfig, Run]) -> None:
    store, config, _ = trained
    other = tiny_config(store.url, config.data.source, "name=other", 'train.mix=["small:1", "none:1"]')
    with pytest.raises(ObjectMissing, match="'none'"):
        check_inputs(other, "train")
    check_inputs(config, "train")


def test_no_shard_of_a_pinned_version_is_garbage(trained: tuple[Store, RunConfig, Run]) -> None:
    store, _, _ = trained
    assert [garbage.name for garbage in collect(store, 0, remove=False) if garbage.kind == "shard"] == []
