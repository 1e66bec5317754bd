"""Section 4 of the paper: which features carry indirect objects."""
