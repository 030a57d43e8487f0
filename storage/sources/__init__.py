"""Source files: finds, identifies and mirrors them, and reads their documents.

To add a file format, implement `documents.Reader` in a new module and list it in `documents.READERS`. Its suffix goes
to `selection.SUFFIXES` and the help of `data.source`. HellaSwag's reader in `model/evaluation/` is a separate one.
"""
