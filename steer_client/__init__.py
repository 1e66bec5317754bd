"""Python client and command line for a steer server."""
