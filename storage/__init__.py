"""The object store and everything kept in it: source files, token shards, manifests. Imports neither Prefect nor torch.

    stores/       where objects live: a folder or an S3 bucket. A new kind of store goes here.
    sources/      published text: local files, buckets, the Hugging Face Hub, and their formats
    datasets/     source files to token shards to sealed, immutable versions
    cache/        verified copies of shards on this host
    inspection/   read-only views of a dataset: summary, lineage, verification, leaks

Every object's key is spelled in `keys.py`, every error is listed in `errors.py`.
"""
