"""Section 3 of the paper: automatic interpretability."""
