"""Every error that steer raises on purpose.

* SteerError
  x InvalidRequest
    - UnknownFeature
    - ConflictingEdits
    - PromptTooLong
    - EditTooLarge
  x DictionaryNotFound
  x SessionNotFound
  x NameTaken
  x DictionaryMismatch
  x DictionaryInUse
  x CorruptDictionary
  x Overloaded
  x OutOfMemory
  x EngineUnavailable
  x EditNotApplied
  x UnsupportedVllm
  x WrongState
  x SessionClosed
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


class ConflictingEdits(InvalidRequest):
    """Two edits of one program target the same feature."""


class PromptTooLong(InvalidRequest):
    """The prompt leaves no room for a token in the model's context."""


class EditTooLarge(InvalidRequest):
    """An edit would move x so far that the model could not compute with it."""


class DictionaryNotFound(SteerError):
    """No dictionary of that name is resident."""

    def __init__(self, message: str, *, name: str = "", field: str = "") -> None:
        super().__init__(message, field=field)
        self.name = name


class SessionNotFound(SteerError):
    """No session of that name is open."""

    def __init__(self, message: str, *, name: str = "", field: str = "") -> None:
        super().__init__(message, field=field)
        self.name = name


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
    """An operator has closed the session."""


class NotConfigured(SteerError):
    """The server was started without the setting that this needs."""


class InvalidConfig(SteerError):
    """A setting is not allowed; `field` is its key. The server does not start."""
