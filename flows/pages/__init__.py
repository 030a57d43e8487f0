"""Pages for people: the report, the dataset card, their templates and plots."""
