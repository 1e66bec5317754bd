"""Read and edit a served language model feature by feature."""

__version__ = "0.1.0"
