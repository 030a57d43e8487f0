"""The object store and everything kept in it: source files, token shards, manifests. Imports neither Prefect nor torch.

`keys.py` has every key, `errors.py` every error. A new kind of store goes to `stores/`, a file format to `sources/`.
"""
