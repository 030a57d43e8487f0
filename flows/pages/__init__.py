"""Pages for people: templates, plots as inline SVG, the dataset card."""
