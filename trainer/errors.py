"""Errors of the trainer.

* SteerError
  x TrainerError
    - BadConfig
    - FetchFailed
    - BadCorpus
    - BadCheckpoint
    - RankLost
  x Interrupted
"""

from steer_server.errors import SteerError


class TrainerError(SteerError):
    """Base of what stops a command; the message says what came, what is allowed and what to do."""


class BadConfig(TrainerError):
    """A key or value of the configuration is not allowed."""


class FetchFailed(TrainerError):
    """A model or corpus could not be fetched, or is not the file that was asked for."""


class BadCorpus(TrainerError):
    """No documents could be read, or they are not what the reader expects."""


class BadCheckpoint(TrainerError):
    """A run folder belongs to another configuration or is damaged."""


class RankLost(TrainerError):
    """Another process of the same training ended or cannot be reached."""


class Interrupted(SteerError):
    """Ctrl-C or SIGTERM came; the work so far is on disk and the same command goes on from there."""
