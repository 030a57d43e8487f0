"""Object stores: one interface (`store.py`), implemented by a folder and by S3.

A new kind of store is one module here that implements `store.Store`, and one line in `opening.open_store`.
"""
