"""The paper's trade-offs: sparsity, size, site and seed against quality."""
