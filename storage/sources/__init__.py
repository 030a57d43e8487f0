"""Source files: finds, identifies and mirrors them, and reads their documents.

To add a file format, teach `formats` to rewrite it as parquet. Its suffix goes to `selection.FORMATS` and the help of
`data.source`. HellaSwag's reader in `model/evaluation/` is a separate one.
"""
