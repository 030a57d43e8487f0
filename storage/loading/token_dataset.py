"""A sealed dataset for other trainers, as a map-style torch dataset. Torch's DataLoader asks for no base class."""

import numpy as np

from storage.datasets.versions import find_version
from storage.loading.windows import Windows
from storage.stores.opening import open_store


class TokenDataset:
    """`epochs` passes over the windows of a split, in this project's training order.

    Item i is window i: `sequence_tokens` inputs, and for each input the token after it, two int64 arrays. `version` is
    latest or the start of a digest. Raises ObjectMissing for an unknown store, dataset or version, else ValueError.
    """

    def __init__(
        self, store_url: str, dataset: str, split: str = "train", sequence_tokens: int = 1_024, seed: int = 1337,
        version: str = "latest", epochs: int = 1,
    ) -> None:  # fmt: skip
        if split not in ("train", "val") or min(sequence_tokens, epochs) < 1:
            given = f"split {split!r}, sequence_tokens {sequence_tokens:,}, epochs {epochs:,}"
            raise ValueError(f"TokenDataset: split should be train or val, the numbers at least 1, found {given}.")
        store = open_store(store_url)
        manifest = find_version(store, dataset, version)
        self.windows = Windows(store, dataset, manifest, split, sequence_tokens=sequence_tokens, seed=seed)
        self._epochs = epochs
        self._arguments = store_url, dataset, split, sequence_tokens, seed, manifest.digest, epochs

    def __reduce__(self) -> tuple[object, ...]:
        return TokenDataset, self._arguments

    def __len__(self) -> int:
        return self.windows.order.epoch_windows * self._epochs

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        tokens = self.windows.read(range(len(self))[index], 1)[0].astype(np.int64)
        return tokens[:-1], tokens[1:]
