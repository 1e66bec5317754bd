"""Section 5 of the paper: what activates a feature, what it does, what causes it."""
