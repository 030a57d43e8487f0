"""Source files: found and identified wherever they are published, then read as documents.

A new file format is one reader module beside `parquet.py` and `jsonl.py`, and one line in `documents.py`.
"""
