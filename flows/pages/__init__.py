"""Pages for people: the report of one or several runs, the dataset card, their templates and charts."""
