"""Object stores: one interface (`store.py`), implemented by a folder and by S3.

A new kind of store is a module that implements `store.Store`, and its scheme in `opening.py`: in `_store_at`, and for
buckets also in `SCHEMES` and `open_bucket`, which read source files and mirrored files. Name the scheme in the help of
`store_url` and `data.source` (`model/config.py`).
"""
