"""Every error that steer raises on purpose.

* SteerError
  x InvalidRequest
    - UnknownFeature
    - PositionOutOfRange
    - ConflictingEdits
    - PromptTooLong
    - EditTooLarge
  x NotFound
    - DictionaryNotFound
    - PresetNotFound
    - SessionNotFound
  x NameTaken
  x DictionaryMismatch
  x UnsupportedModel
  x DictionaryInUse
  x CorruptDictionary
  x Overloaded
    - QuotaExceeded
  x OutOfMemory
  x Unauthenticated
  x PermissionDenied
  x DuplicateRequest
  x DeadlineTooShort
  x SlowReader
  x EngineUnavailable
  x EditNotApplied
  x UnsupportedVllm
  x WrongState
  x SessionClosed
  x SessionExpired
  x NotConfigured
  x InvalidConfig
"""


class SteerError(Exception):
    """Base of all; a message says what came, what is allowed and what to do."""

    def __init__(self, message: str, *, field: str = "") -> None:
        """`field` is the proto path of the value at fault, as in `edits[2].clamp.value`."""
        super().__init__(message)
        self.field = field


class InvalidRequest(SteerError):
    """A value of the request is not allowed; `field` names it."""


class UnknownFeature(InvalidRequest):
    """A feature index is not in the dictionary."""


class PositionOutOfRange(InvalidRequest):
    """A position is not in the prompt it counts in."""


class ConflictingEdits(InvalidRequest):
    """Two edits of one program target the same feature."""


class PromptTooLong(InvalidRequest):
    """The prompt leaves no room for a token in the model's context."""


class EditTooLarge(InvalidRequest):
    """An edit would move x so far that the model could not compute with it."""


class NotFound(SteerError):
    """Nothing of that name is there; base of those that say of what kind."""

    def __init__(self, message: str, *, name: str = "", field: str = "") -> None:
        super().__init__(message, field=field)
        self.name = name


class DictionaryNotFound(NotFound):
    """No dictionary of that name is resident."""


class PresetNotFound(NotFound):
    """The server's file has no preset of that name."""


class UnsupportedModel(SteerError):
    """The served model cannot do what was asked of it."""


class NameTaken(SteerError):
    """A dictionary of that name is resident, or on its way in or out."""


class DictionaryMismatch(SteerError):
    """The dictionary is sound but not for this model or site, or lacks what was asked of it."""


class DictionaryInUse(SteerError):
    """Running requests name the dictionary, so it cannot go."""


class CorruptDictionary(SteerError):
    """The files are not what the card says; nothing was loaded."""


class Overloaded(SteerError):
    """No room now; the same request may succeed later."""


class QuotaExceeded(Overloaded):
    """The caller's own share is used up."""

    def __init__(self, message: str, *, subject: str, retry_seconds: float) -> None:
        """`subject` is whose quota it is; the same request may succeed after `retry_seconds`."""
        super().__init__(message)
        self.subject = subject
        self.retry_seconds = retry_seconds


class Unauthenticated(SteerError):
    """The call does not say who makes it, or nobody knows them."""


class PermissionDenied(SteerError):
    """The caller is known and may not do that."""


class DuplicateRequest(SteerError):
    """A call with that request id runs."""


class DeadlineTooShort(SteerError):
    """The call's deadline leaves no time to serve it."""


class SlowReader(SteerError):
    """The client has not taken what was sent to it for too long; its call ends."""


class AnswerTooLarge(SteerError):
    """The answer is larger than a message may be."""


class OutOfMemory(SteerError):
    """What was asked for does not fit memory; nothing was loaded."""


class EngineUnavailable(SteerError):
    """The engine is starting, stopping or dead."""


class EditNotApplied(SteerError):
    """An edit did not run on tokens it should have; the output must not be trusted."""


class UnsupportedVllm(SteerError):
    """This vLLM, model structure or engine setting cannot carry edits; the server does not start."""


class WrongState(SteerError):
    """The session cannot do that now: a turn runs, or none does."""


class SessionClosed(SteerError):
    """An operator has ended the session."""


class SessionExpired(SteerError):
    """The session idled, or lived, longer than the server allows."""


class SessionNotFound(NotFound):
    """No session of that name is open."""


class NotConfigured(SteerError):
    """The server was started without the setting that this needs."""


class InvalidConfig(SteerError):
    """A setting is not allowed; `field` is its key. The server does not start."""
