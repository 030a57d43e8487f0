"""Windows of tokens in the order in which training reads them. Imports no torch."""
