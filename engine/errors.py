"""Every error that a caller of Millrace can meet.

MillraceError
├── RequestError          the request is at fault; names the field and the limit
│   ├── InvalidRequest    a value is malformed or out of range
│   ├── DuplicateRequest  the id belongs to a live request
│   └── Overloaded        refused for now; retry_after_s says when to try again
├── EngineUnavailable     the engine is starting, draining or dead
│   └── DeviceLost        the device answers no more; only a new process can use it again
├── NotEnoughMemory       what the settings ask for does not fit on the device
├── StepFailed            this request's part of a step failed (NaN logits, no token left to choose)
└── ModelError            the model on disk cannot be served
    ├── WeightsError      a tensor is missing, mis-shaped or unreadable
    ├── UnsupportedModel  an architecture or format that Millrace does not run
    └── TemplateError     the chat template cannot be compiled or rendered

`engine/server/status.py` holds the one table from these to gRPC status codes.
"""


class MillraceError(Exception):
    """Base of all errors below."""


class RequestError(MillraceError):
    """The request is at fault. `field` is the public field's name, `limit` what it must satisfy."""

    def __init__(self, message: str, field: str = "", limit: str = "") -> None:
        super().__init__(message)
        self.field = field
        self.limit = limit


class InvalidRequest(RequestError):
    """A value is malformed or out of range."""


class DuplicateRequest(RequestError):
    """The request id belongs to a request that has not ended yet."""


class Overloaded(RequestError):
    """Refused to protect the requests already accepted; try again after `retry_after_s` seconds."""

    def __init__(self, message: str, field: str = "", limit: str = "", retry_after_s: float = 1.0):
        super().__init__(message, field, limit)
        self.retry_after_s = retry_after_s


class EngineUnavailable(MillraceError):
    """The engine is starting, draining or dead; another replica may answer."""


class DeviceLost(EngineUnavailable):
    """The device answers this process no more; only a new process can use it again."""


class NotEnoughMemory(MillraceError):
    """What the settings ask for does not fit on the device; the message says what to lower."""


class StepFailed(MillraceError):
    """This request failed inside the engine; its neighbours did not."""


class ModelError(MillraceError):
    """The model on disk cannot be served."""


class WeightsError(ModelError):
    """A weight file is missing, truncated or malformed, or a tensor is missing or mis-shaped."""


class UnsupportedModel(ModelError):
    """An architecture, quantisation or file format that Millrace does not run."""


class TemplateError(ModelError):
    """The chat template is absent, or cannot be compiled or rendered within its bounds."""
