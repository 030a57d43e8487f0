"""The object store and all that it keeps: source files, token shards, manifests. Imports neither Prefect nor torch."""
