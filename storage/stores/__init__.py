"""Object stores: one interface (`store.py`), implemented by a folder and by S3.

To add a kind of store, implement `store.Store` in a new module and add its scheme to `opening._store_at`; for buckets
also to `SCHEMES` and `open_bucket`. Name the scheme in the help of `store_url` and `data.source` (`model/config.py`).
"""
