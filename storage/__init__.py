"""The object store and everything kept in it: source files, token shards, manifests. Imports neither Prefect nor torch.

    stores/       where objects live: a folder or an S3 bucket. A new kind of store goes here.
    sources/      source files: local, in buckets, on the Hugging Face Hub. A new file format goes here.
    datasets/     source files to token shards to sealed, immutable versions
    cache/        verified copies of shards on this host
    inspection/   read-only views of a dataset: summary, lineage, verification, leaks

`keys.py` defines every key, and `errors.py` every error.
"""
