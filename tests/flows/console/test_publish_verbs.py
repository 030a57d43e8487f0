"""`gpt2 dataset publish` and `gpt2 dataset pull`."""

from pathlib import Path

import pytest

from model.config import RunConfig
from storage.datasets.manifest import latest_manifest
from storage.stores.opening import open_store
from tests.conftest import BuildDataset
from tests.flows.in_process import Gpt2
from tests.hub import TOKEN, Hub

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # inside the Hub's client


def test_a_version_is_published_and_pulled_under_another_name(
    gpt2: Gpt2, hub: Hub, config: RunConfig, build: BuildDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = build(config)
    shards = len(manifest.shard_ids)
    own = ["--to", "me/tokens", "--set", f"store_url={config.store_url}"]
    outcome = gpt2("dataset", "publish", *own)
    assert (outcome.code, "HF_TOKEN" in outcome.error, hub.requests) == (2, True, [])
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for sent in (shards, 0):
        outcome = gpt2("dataset", "publish", config.data.dataset, "--version", manifest.digest[:8], "--private", *own)
        assert (outcome.code, f"{sent} of {shards} shards uploaded" in outcome.out) == (0, True), outcome
    assert hub.repositories["me/tokens"].private
    commit = outcome.out.split()[-1]
    elsewhere = ["theirs", "--set", f"store_url={tmp_path / 'pulled'}"]
    for pulled in (shards, 0):
        outcome = gpt2("dataset", "pull", "me/tokens", *elsewhere, "--revision", commit)
        assert (outcome.code, f"{pulled} of {shards} shards downloaded" in outcome.out) == (0, True), outcome
    assert latest_manifest(open_store(str(tmp_path / "pulled")), "theirs") == manifest
    assert gpt2("dataset", "verify", *elsewhere).code == 0
    outcome = gpt2("dataset", "pull", "me/tokens", *elsewhere[1:])
    assert (outcome.code, "NAME" in outcome.error) == (2, True), outcome
    outcome = gpt2("dataset", "pull", "me/nothing", *elsewhere)
    assert (outcome.code, "me/nothing" in outcome.error, "no such dataset" in outcome.error) == (2, True, True), outcome
    assert TOKEN not in outcome.text
