"""Contenders of bench_loader.py that other projects' loaders are; run by a Python that has them installed.

    python loader_peers.py versions
    python loader_peers.py write SHARDS FOLDER                     their own files, of the tokens of the .bin files
    python loader_peers.py litdata|mosaicml FOLDER_OR_URL WORKERS TOKENS SECONDS

Imports nothing of this project. Each gives batches of B windows of T + 1 tokens, shuffled by its own rule, int64, and
stops after so many tokens or seconds. A URL (s3://…) is read through an empty cache in the folder that it works in;
the server and its keys are the environment's.
"""

import json
import os
import sys
import time
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

B, T = 8, 1_024
PACKAGES = {"litdata": "litdata", "streaming": "mosaicml-streaming", "torch": "torch"}  # as imported, as installed


def consume(batches, begin, tokens, seconds):
    """Takes x and y of batch after batch and writes down what came when."""
    import torch

    taken, first = 0, 0.0
    for x_BT, y_BT in batches:
        assert x_BT.shape[1] == T
        assert x_BT.dtype == y_BT.dtype == torch.int64
        taken += x_BT.numel()
        now = time.monotonic()
        first = first or now - begin
        if taken >= tokens or now - begin > seconds:
            break
    Path("result.json").write_text(
        json.dumps({"begin": begin, "end": now, "tokens": taken, "first_seconds": first, "first_tokens": B * T})
    )


def halves(batches):
    for windows in batches:
        wide = windows.long()
        yield wide[:, :-1], wide[:, 1:]


def litdata(place, workers, tokens, seconds):
    import litdata as peer
    from litdata.streaming import downloader

    downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True  # else it refuses a server without TLS
    options = {"endpoint_url": os.environ["AWS_ENDPOINT_URL_S3"]} if place.startswith("s3://") else {}
    begin = time.monotonic()
    data = peer.StreamingDataset(
        place, cache_dir="cache" if options else None, storage_options=options, shuffle=True, drop_last=True,
        item_loader=peer.TokensLoader(block_size=T + 1),
    )  # fmt: skip
    consume(halves(peer.StreamingDataLoader(data, batch_size=B, num_workers=workers)), begin, tokens, seconds)


def mosaicml(place, workers, tokens, seconds):
    import torch
    from streaming import StreamingDataset

    class Windows(StreamingDataset):
        def __getitem__(self, index):
            return torch.from_numpy(super().__getitem__(index)["tokens"])

    remote = place.startswith("s3://")
    begin = time.monotonic()
    where = {"remote": place, "local": "cache"} if remote else {"local": place}
    data = Windows(**where, shuffle=True, batch_size=B)
    loader = torch.utils.data.DataLoader(data, batch_size=B, num_workers=workers, drop_last=True)
    consume(halves(loader), begin, tokens, seconds)


def one_shard(path):
    import numpy as np
    import torch

    yield torch.from_numpy(np.fromfile(path, np.uint16))


def write(shards, folder):
    """litdata's chunks and mosaicml's shards, of the same size as the .bin files."""
    import litdata as peer
    import numpy as np
    from streaming import MDSWriter

    paths = sorted(str(path.absolute()) for path in Path(shards).glob("*.bin"))
    peer.optimize(
        fn=one_shard, inputs=paths, output_dir=f"{folder}/litdata", chunk_size=max(map(os.path.getsize, paths)) // 2,
        num_workers=1, item_loader=peer.TokensLoader(), reorder_files=False, verbose=False,
    )  # fmt: skip
    with MDSWriter(
        out=f"{folder}/mosaicml", columns={"tokens": "ndarray:uint16"}, size_limit=max(map(os.path.getsize, paths))
    ) as writer:
        for path in paths:
            ids = np.fromfile(path, np.uint16)
            for start in range(0, len(ids) - T, T):
                writer.write({"tokens": ids[start : start + T + 1]})


def versions():
    for module, package in PACKAGES.items():
        try:
            import_module(module)
        except ImportError as error:
            sys.exit(f"{package} cannot be imported ({error})")
    print(json.dumps({package: version(package) for package in PACKAGES.values()}))


if __name__ == "__main__":
    what, *words = sys.argv[1:]
    if what in {"litdata", "mosaicml"}:
        place, workers, tokens, seconds = words
        globals()[what](place, int(workers), int(tokens), float(seconds))
    else:
        {"versions": versions, "write": write}[what](*words)
