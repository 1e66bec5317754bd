"""The experiments of arXiv 2309.08600 on our dictionaries, a command each, and the report that holds them together."""
