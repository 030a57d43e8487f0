"""Bytes at keys: the object store, and what the pipeline keeps in it. Knows neither Prefect nor torch.

    FORMAT                                        layout number; a reader refuses a higher one
    sources/{digest}/{file}                       a published file as downloaded
    datasets/{dataset}/shards/{shard_id}.bin      token ids, little-endian uint16, immutable
    datasets/{dataset}/shards/{shard_id}.json     the shard's record, written last: record there = shard done
    datasets/{dataset}/split.json                 the val shards and what the name is bound to, create-only
    datasets/{dataset}/manifests/{sha256}.json    an immutable version of the dataset
    datasets/{dataset}/latest.json                which manifest is the newest: swapped
    runs/{run}/…                                  config, jobs, results, checkpoints, metrics, evaluations, report

Reading order: errors, store, folder, keys, canonical, sources, plan, shards, manifest, cache.
"""
