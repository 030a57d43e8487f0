"""The global window order: which windows of tokens each step reads. Opens no shard, imports no torch.

A shard is cut into windows of T + 1 tokens that start T apart. An epoch is a seeded order of all windows of the split.
Step k takes the next windows of the order, whatever the number of ranks: 1 rank and 8 see the same batch. The state
is (manifest, seed, next window).

    window index ─▶ epoch, place ─▶ group of shards ─▶ shard, start ─▶ T + 1 tokens

Shards are shuffled, then cut into groups of GROUP_SHARDS, and windows are shuffled within a group. Reads therefore stay
within a few shards at a time, and no array holds the windows of a whole epoch.
"""

from functools import lru_cache

import numpy as np

GROUP_SHARDS = 8  # 8 full shards are 156,250 windows of T = 512: well mixed, and 160 MB of mapped files


class WindowOrder:
    """The order of an endless stream of windows: a pure function of the shards' lengths, T and the seed."""

    def __init__(self, shard_tokens: list[int], sequence_tokens: int, seed: int) -> None:
        self.windows_of_shard = np.array([max(tokens - 1, 0) // sequence_tokens for tokens in shard_tokens], np.int64)
        self.epoch_windows = int(self.windows_of_shard.sum())
        self._seed = seed
        # One cache for each order: those of a mix would evict each other from a shared one
        self._epoch = lru_cache(maxsize=2)(self._shuffled_epoch)
        self._group = lru_cache(maxsize=2)(self._shuffled_group)
        if not self.epoch_windows:
            longest = f"the longest shard has {max(shard_tokens, default=0):,}"
            problem = f"{sequence_tokens:,}: a window needs {sequence_tokens + 1:,} tokens, but {longest}"
            remedy = "Use a smaller train.sequence_tokens in a new run, or a larger data.shard_tokens in a new dataset."
            raise ValueError(f"train.sequence_tokens = {problem}. {remedy}")

    def locate(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Shard and window in that shard for `count` windows of the stream from `first` on."""
        shard_of, window_of = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        while count:
            epoch, place = divmod(first, self.epoch_windows)
            _, ends = self._epoch(epoch)
            group = int(np.searchsorted(ends, place, side="right"))
            start = place - (int(ends[group - 1]) if group else 0)
            shards, windows = self._group(epoch, group)
            taken = min(count, len(shards) - start)
            shard_of.append(shards[start : start + taken])
            window_of.append(windows[start : start + taken])
            first += taken
            count -= taken
        return np.concatenate(shard_of), np.concatenate(window_of)

    def upcoming_shards(self, first: int) -> list[int]:
        """The shards of the group that holds window `first`, then those of the next group."""
        upcoming: list[int] = []
        for _ in range(2):
            epoch, place = divmod(first, self.epoch_windows)
            shards, ends = self._epoch(epoch)
            group = int(np.searchsorted(ends, place, side="right"))
            upcoming += shards[group * GROUP_SHARDS : (group + 1) * GROUP_SHARDS].tolist()
            first += int(ends[group]) - place
        return upcoming

    def in_file_order(self, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shard and window in that shard for the chosen windows, counted shard by shard."""
        ends = np.cumsum(self.windows_of_shard)
        shard_of = np.searchsorted(ends, chosen, side="right")
        return shard_of, chosen - (ends - self.windows_of_shard)[shard_of]

    def _shuffled_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards of an epoch in their order, and the end of each group in windows."""
        shards = _shuffled(len(self.windows_of_shard), self._seed, epoch)
        ends = np.cumsum(self.windows_of_shard[shards])
        return shards, ends[[*range(GROUP_SHARDS - 1, len(ends) - 1, GROUP_SHARDS), len(ends) - 1]]

    def _shuffled_group(self, epoch: int, group: int) -> tuple[np.ndarray, np.ndarray]:
        shards = self._epoch(epoch)[0][group * GROUP_SHARDS : (group + 1) * GROUP_SHARDS]
        counts = self.windows_of_shard[shards]
        windows = np.concatenate([np.arange(count) for count in counts])
        order = _shuffled(len(windows), self._seed, epoch, group)
        return np.repeat(shards, counts)[order], windows[order]


def _shuffled(count: int, *seed: int) -> np.ndarray:
    """A permutation that is the same in every version of numpy: the argsort of PCG64's raw bits."""
    return np.argsort(np.random.PCG64(list(seed)).random_raw(count), kind="stable")
