"""Jobs, and runs pinned to their inputs. Imports no torch."""
