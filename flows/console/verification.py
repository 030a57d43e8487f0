"""What `gpt2 dataset verify` does: check the newest version, and let the next build replace damaged shards."""

import secrets
from collections.abc import Callable, Sequence
from typing import NamedTuple

from model import tokenizer
from model.config import RunConfig
from storage.datasets.manifest import Manifest
from storage.datasets.plan import plan_files
from storage.datasets.versions import newest_version
from storage.inspection.verify import Damage, check_documents, verify_dataset
from storage.keys import DatasetKeys
from storage.sources.files import SourceFile
from storage.sources.mirror import list_source
from storage.stores.store import Store


class Target(NamedTuple):
    """The version to verify, and the configuration with its source at the commit that the version was made from."""

    store: Store
    config: RunConfig
    manifest: Manifest

    @property
    def dataset(self) -> str:
        """The dataset's name."""
        return self.config.data.dataset

    def source_files(self) -> Sequence[SourceFile]:
        """The source's files. Raises ValueError or StorageError when the source cannot be listed."""
        data = self.config.data
        listed, _ = list_source(self.store, data.source, data.config, data.revision, "train")
        return listed.files


class Verification(NamedTuple):
    """What was compared, and the damage: in shards, which can be rebuilt, and elsewhere."""

    target: Target
    damaged_shards: list[Damage]
    other_damage: list[Damage]
    documents: int

    @property
    def damage(self) -> list[Damage]:
        """All damage, that of shards first."""
        return self.damaged_shards + self.other_damage

    @property
    def whole_shards(self) -> int:
        """The number of shards without damage."""
        return len(self.target.manifest.shard_ids) - len(self.damaged_shards)


def newest_target(store: Store, config: RunConfig) -> Target:
    """The dataset's newest version. Raises ObjectMissing when it was never sealed."""
    manifest = newest_version(store, config.data.dataset)
    if config.data.source == manifest.origin.get("dataset"):
        data = config.data.model_copy(update={"revision": manifest.origin["commit"]})
        config = config.model_copy(update={"data": data})
    return Target(store, config, manifest)


def verify(
    target: Target, files: Sequence[SourceFile], *, quick: bool, deep: int, on_progress: Callable[[], None]
) -> Verification:
    """Check every shard, the version's ancestors unless `quick`, and `deep` random documents against `files`."""
    store, _, manifest = target
    damage = verify_dataset(
        store, target.dataset, manifest, eot=tokenizer.EOT, depth="quick" if quick else "full", on_progress=on_progress
    )
    damaged_shards = [item for item in damage if item.repairable]
    other_damage = [item for item in damage if not item.repairable]
    documents: list[Damage | None] = []
    if deep:
        seed = secrets.randbits(32)  # other documents each time
        checked = check_documents(store, target.dataset, manifest, files, tokenizer.encode, count=deep, seed=seed)
        documents = list(checked)
    other_damage += [item for item in documents if item is not None]
    return Verification(target, damaged_shards, other_damage, len(documents))


def forget_shards(target: Target, files: Sequence[SourceFile], damage: list[Damage]) -> None:
    """Delete the records of damaged shards: the next build makes these shards again and replaces the damaged ones.

    Raises ValueError, and deletes nothing, when the source no longer contains one of them.
    """
    shard_ids = {shard.name for shard in damage}
    _check_source(target, files, shard_ids)
    for shard_id in sorted(shard_ids):
        target.store.delete(DatasetKeys(target.dataset).record(shard_id))


def _check_source(target: Target, files: Sequence[SourceFile], shard_ids: set[str]) -> None:
    data = target.config.data
    plans = plan_files(target.store, data.dataset, files, data.spec(tokenizer.identity()).settings)
    missing = shard_ids.difference(*(plan.shard_ids for plan in plans))
    if missing:
        raise ValueError(
            f"--repair: data.source = {data.source!r} no longer contains {len(missing):,} of the damaged shards "
            f"({min(missing)!r}). Restore the old source files, or build another dataset from the new ones."
        )
