"""Source files: finds, identifies and mirrors them, and reads their documents.

To add a file format, implement `documents.Reader` in a new module, as `parquet.py` and `jsonl.py` do. List it in
`documents.READERS`, and its suffix in `selection.SUFFIXES` and in the help of `data.source` (`model/config.py`). On the
Hub the library `datasets` must know the format too. HellaSwag files have a reader of their own in `model/evaluation/`.
"""
