"""Random faults between the pipeline and a real S3 server, during builds and trainings.

    python tests/stress.py --faults 500 --server minio        (make stress)

Each round builds a dataset and trains on it in a new store. Afterwards the store, read without the proxy, must equal an
undisturbed folder store, and the number of requests must be bounded by the number of faults.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

from model import tokenizer
from model.__main__ import run_job
from model.runs.job import put_job
from model.runs.run import pin_run, training_job
from storage.cache import host as host_cache
from storage.datasets.manifest import Manifest
from storage.digests import sha256
from storage.inspection.verify import check_fully, check_versions
from storage.stores import s3, s3_client
from storage.stores.opening import open_store
from storage.stores.store import Store
from tests import servers
from tests.making import build_dataset, document, tiny_config, write_parquet
from tests.model.training_runs import final_weights, history
from tests.proxy import Fault, Proxy, Request, running_proxy

ANYWHERE: tuple[Fault, ...] = (
    "503", "503 later", "429", "500", "reset", "lost", "stall", "cut", "stall in body", "flip",
)  # fmt: skip
ON_PUTS: tuple[Fault, ...] = ("409", "flip up")
RATE = 0.1
REQUESTS_A_FAULT = 5  # the retried request, a stat, a read-back, and a fault in one of these
READ_SECONDS = 0.5  # after which a stalled response times out


class Outcome(NamedTuple):
    """The results of a round, comparable with those of another."""

    manifest: str
    metrics: list[dict[str, object]]
    weights: str


class Figures(NamedTuple):
    """The counts of a stress run."""

    rounds: int
    requests: int
    undisturbed_requests: int
    faults: Counter[str]


def stress(server: servers.Server, folder: Path, faults: int, seed: int) -> Figures:
    """Run rounds until this many faults were injected. Fails when data are lost or wrong, or requests are unbounded."""
    chance = random.Random(seed)
    source = folder / "source"
    for index in range(2):
        write_parquet(source / f"file_{index}.parquet", [document(index * 40 + number) for number in range(40)])
    expected = _round(str(folder / "undisturbed"), source)
    counted_requests: list[int] = []

    def plan(request: Request) -> Fault | None:
        if len(counted_requests) == 1 and chance.random() < RATE:
            conditional = request.method == "PUT" and "if-none-match" in request.headers
            return chance.choice(ANYWHERE + ON_PUTS * conditional)
        return None

    with running_proxy(server.endpoint, plan) as proxy:
        assert _on_server(server, proxy, folder, source, "undisturbed") == expected
        baseline = len(proxy.requests)
        counted_requests.append(baseline)
        rounds = 0
        while len(proxy.injected) < faults:
            rounds += 1
            assert _on_server(server, proxy, folder, source, f"{seed}-{rounds}") == expected
        requests, injected = len(proxy.requests) - baseline, Counter(proxy.injected)
    assert requests <= rounds * baseline + REQUESTS_A_FAULT * injected.total(), (requests, baseline, injected)
    return Figures(rounds, requests, baseline, injected)


def _on_server(server: servers.Server, proxy: Proxy, folder: Path, source: Path, name: str) -> Outcome:
    """Run one round through the proxy with a cold cache, then verify its store without the proxy."""
    shutil.rmtree(host_cache.FOLDER, ignore_errors=True)
    os.environ["AWS_ENDPOINT_URL_S3"] = proxy.endpoint
    _forget_client()
    url = f"s3://{servers.BUCKET}/stress-{folder.name}-{name}"
    outcome = _round(url, source)
    os.environ["AWS_ENDPOINT_URL_S3"] = server.endpoint
    _forget_client()
    store = open_store(url)
    assert outcome == _outcome(store, build_dataset(tiny_config(url, f"{source}/*.parquet")))
    return outcome


def _round(url: str, source: Path) -> Outcome:
    """Build the dataset and train on it."""
    config = tiny_config(url, f"{source}/*.parquet")
    manifest = build_dataset(config)
    store = open_store(url)
    job = training_job(pin_run(store, config, manifest.digest, None))
    assert run_job(url, put_job(store, job)) == 0
    return _outcome(store, manifest)


def _outcome(store: Store, manifest: Manifest) -> Outcome:
    damaged = [check_fully(store, "small", row, tokenizer.EOT) for row in manifest.rows()]
    assert not any(damaged) and not list(check_versions(store, "small", manifest)), damaged
    return Outcome(manifest.digest, history(store, "tiny"), sha256(final_weights(store, "tiny")))


def _forget_client() -> None:
    s3_client.own_client.cache_clear()
    s3.S3Store.checked_buckets.clear()


def main() -> None:
    """Run the stress test against a new server and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=500)
    parser.add_argument("--server", choices=["seaweedfs", "minio"], default="seaweedfs")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    s3_client.READ_SECONDS = READ_SECONDS
    with tempfile.TemporaryDirectory() as name:
        host_cache.FOLDER = Path(name) / "cache"
        server = servers.start(options.server, Path(name) / "server")
        os.environ |= server.environment
        try:
            started = time.monotonic()
            figures = stress(server, Path(name), options.faults, options.seed)
        finally:
            server.stop()
    print(f"{options.server}, seed {options.seed}: {figures.faults.total()} faults in {figures.requests:,} requests of "
          f"{figures.rounds} rounds ({figures.undisturbed_requests} undisturbed), {time.monotonic() - started:.0f} s; "
          f"no data lost or wrong: {dict(figures.faults)}")  # fmt: skip


if __name__ == "__main__":
    main()
