"""Object stores: one interface (`store.py`), implemented by a folder and by S3.

A new kind of store is a module that implements `store.Store`, and a scheme in `opening._store_at`. If its objects are
not local files, `BUCKET` and `bucket_of` of `sources.files` must accept the scheme too, to read mirrored files back.
"""
