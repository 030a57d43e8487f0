"""Contenders of bench_tokenise.py that this project's Python runs: the bare kernel, a plain pool, and the stage itself.

    python tokenise_ours.py threads|processes|pool CORPUS SHARD_TOKENS
    python tokenise_ours.py build CORPUS SHARD_TOKENS SETTING...

Each writes result.json into its folder: when its work began and ended, and the tokens it made, EOT counted.
"""

import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from model import tokenizer
from model.config import RunConfig
from model.config_file import load_config
from storage.datasets.plan import ShardJob

WORKERS = 2
AT_ONCE = 32  # documents a worker takes at once: whoever is quicker takes more
encoding = tiktoken.Encoding(  # as tiktoken publishes it
    "gpt2", pat_str=r50k_pat_str, mergeable_ranks=tokenizer.ranks(), special_tokens={"<|endoftext|>": tokenizer.EOT}
)
fork = get_context("fork")
texts: list[str] = []  # of the kernel: a forked process finds them there


def documents(corpus: Path) -> Iterator[str]:
    for path in sorted(corpus.glob("*.parquet")):
        with pq.ParquetFile(path) as parquet:
            for part in parquet.iter_batches(1_000, columns=["text"]):
                yield from part.column(0).to_pylist()


def answer(**facts: Any) -> None:
    Path("result.json").write_text(json.dumps(facts))


def count(start: int) -> int:
    """The kernel's share: tokens of some documents, encoded and thrown away."""
    some = texts[start : start + AT_ONCE]
    return sum(len(encoding.encode_to_numpy(text, disallowed_special=())) + 1 for text in some)


def kernel(corpus: Path, kind: str) -> None:
    texts.extend(documents(corpus))
    count(0)
    start_together = fork.Barrier(WORKERS + 1)
    pool = (
        ThreadPoolExecutor(WORKERS)
        if kind == "threads"
        else ProcessPoolExecutor(WORKERS, fork, initializer=start_together.wait)
    )
    with pool:
        if kind == "processes":
            pool.submit(count, 0)  # starts them
            start_together.wait()
        begin = time.monotonic()
        tokens = sum(pool.map(count, range(0, len(texts), AT_ONCE)))
        answer(begin=begin, end=time.monotonic(), tokens=tokens)


def tokenised(text: str) -> np.ndarray:
    """As build-nanogpt's fineweb.py does it."""
    ids = [tokenizer.EOT]
    ids.extend(encoding.encode_ordinary(text))
    array = np.array(ids)
    assert (array >= 0).all()
    assert (array < 2**16).all()
    return array.astype(np.uint16)


def pool(corpus: Path, shard_tokens: int) -> None:
    """build-nanogpt's shape: documents go out to a pool, ids come back through pipes, the parent fills the shards."""
    with fork.Pool(WORKERS) as workers:
        workers.map(tokenised, ["warm"] * WORKERS)
        begin = time.monotonic()
        shard, used, shards = np.empty(shard_tokens, np.uint16), 0, 0
        for ids in workers.imap(tokenised, documents(corpus), chunksize=16):
            left = ids
            while len(left) >= (space := shard_tokens - used):
                shard[used:] = left[:space]
                np.save(f"shard-{shards:06d}", shard)
                left, used, shards = left[space:], 0, shards + 1
            shard[used : used + len(left)] = left
            used += len(left)
        if used:
            np.save(f"shard-{shards:06d}", shard[:used])
        end = time.monotonic()
    made = sum(len(np.load(path, mmap_mode="r")) for path in Path().glob("shard-*.npy"))
    answer(begin=begin, end=end, tokens=made)


def build(corpus: Path, shard_tokens: int, settings: list[str]) -> None:
    """The stage as `gpt2 dataset build` runs it, but for the seal; then the proof that what it left is whole."""
    from flows.runtime import settle
    from storage.datasets.manifest import latest_manifest
    from storage.inspection.verify import check_fully
    from storage.keys import DatasetKeys
    from storage.stores.opening import open_store

    since = datetime.now(UTC)
    config, warm = (
        load_config(
            None,
            [f"store_url={Path(name).absolute()}", f"data.source={source}", f"data.shard_tokens={shard_tokens}",
             "data.dataset=bench", "data.val_shards=1", f"resources.workers={WORKERS}", *settings],
        )
        for name, source in (("store", corpus), ("warm", corpus / "warm"))
    )  # fmt: skip
    begin, end, sealed, planned = _timed(config, warm)
    store = open_store(config.store_url)
    manifest = latest_manifest(store, "bench")
    assert manifest is not None
    damaged = [found for row in manifest.rows() if (found := check_fully(store, "bench", row, tokenizer.EOT))]
    assert not damaged, damaged
    assert manifest.shard_ids == planned
    last = max(store.stat(DatasetKeys("bench").record(shard_id)).modified for shard_id in planned)
    proved = time.monotonic()
    settle.wait_for_task_runs(since, 15)  # as the console does
    answer(
        begin=begin,
        end=end,
        tokens=sum(sums["tokens"] for sums in manifest.totals.values()),
        shards=len(planned),
        proof_seconds=proved - sealed,
        after_last_record_seconds=end - (last - (time.time() - time.monotonic())),
        manifest=manifest.digest,
    )


def _timed(config: RunConfig, warm: RunConfig) -> tuple[float, float, float, list[str]]:
    """Both datasets planned, then the small one made so that every worker is warm, then the large one on the clock.

    The clock stops when the flow would go on to seal: the last shard and its record are in the store, and Prefect has
    told the flow so. Then the stage itself runs, which finds all shards made and seals. Returns when the work began
    and ended, when it was sealed, and the planned shards.
    """
    from prefect import flow, task

    from flows.download import download
    from flows.handoffs import Downloaded
    from flows.tokenise import _run_jobs, task_runner, tokenise

    together = Path("together").absolute()
    together.mkdir()

    @task
    def start(number: int) -> None:
        """Returns when every worker is there: a pool starts its processes one by one, as there is work."""
        (together / str(number)).touch()
        while len(list(together.iterdir())) < WORKERS:
            time.sleep(0.01)

    @flow(name="tokenise", validate_parameters=False)
    def stage(config: RunConfig, downloaded: Downloaded, warm: RunConfig, small: Downloaded) -> tuple[float, float]:
        for future in [start.submit(number) for number in range(WORKERS)]:
            future.result()
        _run_jobs(warm, _jobs(small), len(_planned(small)), len(_planned(small)))
        planned = _planned(downloaded)
        begin = time.monotonic()
        _run_jobs(config, _jobs(downloaded), len(planned), len(planned))
        return begin, time.monotonic()

    @flow(name="build-dataset", validate_parameters=False)
    def whole(config: RunConfig, warm: RunConfig) -> tuple[float, float, float, list[str]]:
        small, downloaded = (download(asked, with_items=False) for asked in (warm, config))
        runner = task_runner(config.resources)
        begin, end = stage.with_options(task_runner=runner)(config, downloaded, warm, small)
        tokenise(config, downloaded)
        return begin, end, time.monotonic(), _planned(downloaded)

    return whole(config, warm)  # type: ignore[no-any-return]


def _planned(downloaded: Any) -> list[str]:
    return [shard_id for plan in downloaded.plans for shard_id in plan.shard_ids]


def _jobs(downloaded: Any) -> Iterator[ShardJob]:
    return (job for plan in downloaded.plans for job in plan.jobs())


def main() -> None:
    what, corpus, shard_tokens, *settings = sys.argv[1:]
    if what == "build":
        build(Path(corpus), int(shard_tokens), settings)
    elif what == "pool":
        pool(Path(corpus), int(shard_tokens))
    else:
        kernel(Path(corpus), what)


if __name__ == "__main__":
    main()
