"""The table from errors to statuses."""

import grpc
import pytest

from millrace.engine import errors
from millrace.engine.server.status import (
    MAX_STATUS_CHARS,
    failure_of,
    log_safe,
    status_of,
)

CODE = grpc.StatusCode


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.InvalidRequest("m", "top_p", "(0, 1]"), CODE.INVALID_ARGUMENT),
        (errors.DuplicateRequest("m", "request_id", "unique"), CODE.ALREADY_EXISTS),
        (errors.Overloaded("m"), CODE.RESOURCE_EXHAUSTED),
        (errors.EngineUnavailable("m"), CODE.UNAVAILABLE),
        (errors.StepFailed("m"), CODE.INTERNAL),
        (errors.TemplateError("m"), CODE.FAILED_PRECONDITION),
        (errors.WeightsError("m"), CODE.INTERNAL),
        (errors.UnsupportedModel("m"), CODE.INTERNAL),
    ],
    ids=lambda value: type(value).__name__,
)
def test_each_error_has_its_code_in_both_forms(
    error: errors.MillraceError, code: grpc.StatusCode
) -> None:
    assert status_of(error).code is code
    assert failure_of(error).code == code.value[0]


def test_every_error_of_the_tree_has_a_code() -> None:
    kinds = [errors.MillraceError]
    for kind in kinds:
        kinds += kind.__subclasses__()
        assert status_of(kind("m")).code is not CODE.UNKNOWN
    assert len(kinds) >= 11


def test_field_and_limit_are_said_to_programs_too() -> None:
    status = status_of(errors.InvalidRequest("top_p must be ...", "top_p", "(0, 1]"))
    assert dict(status.metadata) == {"millrace-field": "top_p", "millrace-limit": "(0, 1]"}


def test_an_overload_says_when_to_come_back() -> None:
    status = status_of(errors.Overloaded("full", "", "at most 4 waiting", retry_after_s=0.25))
    assert dict(status.metadata)["grpc-retry-pushback-ms"] == "250"
    assert ("grpc-retry-pushback-ms", "1") in status_of(
        errors.Overloaded("full", retry_after_s=0.0)
    ).metadata


def test_a_long_message_fits_into_a_trailer() -> None:
    error = errors.InvalidRequest("x" * 10_000_000)
    assert len(status_of(error).message) == MAX_STATUS_CHARS
    assert len(failure_of(error).message) == MAX_STATUS_CHARS


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("plain id-1/2", "plain id-1/2"),
        ("a\nevent=forged", "a%0Aevent=forged"),
        ("é%", "%C3%A9%25"),
    ],
)
def test_what_goes_into_logs_and_metadata_is_printable_ascii(text: str, safe: str) -> None:
    assert log_safe(text) == safe
