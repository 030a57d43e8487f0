"""Source files: found and identified wherever they are published, then read as documents.

A new file format is a reader module beside `parquet.py` and `jsonl.py`, a line in `documents.READERS` and its suffix in
`files.SUFFIXES`.
"""
