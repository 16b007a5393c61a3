import pickle

import pytest

from r1_cluster.api import errors


@pytest.mark.parametrize(
    ("error", "status", "param", "code"),
    [
        (errors.invalid_request("seed", "seed: no"), 400, "seed", None),
        (errors.context_length_exceeded(100, 90, 20), 400, "messages", "context_length_exceeded"),
        (errors.context_length_exceeded(100, 110, None), 400, "messages", "context_length_exceeded"),
        (errors.model_not_found("../../etc"), 404, "model", "model_not_found"),
        (errors.unauthorized(), 401, None, "invalid_api_key"),
        (errors.overloaded(3), 429, None, "rate_limit_exceeded"),
        (errors.unavailable("No engine is ready."), 503, None, "service_unavailable"),
        (errors.internal("abc"), 500, None, "internal_error"),
        (errors.unprepared(), 500, None, "internal_error"),
        (errors.body_too_large(1000), 413, None, None),
        (errors.body_too_slow(30.0), 408, None, None),
        (errors.unsupported_media_type("JSON, please."), 415, None, None),
        (
            errors.context_length_exceeded(100, 110, None, at_least=True),
            400,
            "messages",
            "context_length_exceeded",
        ),
    ],
)
def test_status_and_body(error, status, param, code):
    body = error.body()["error"]
    assert error.status == status
    assert (body["param"], body["code"]) == (param, code)
    assert set(body) == {"message", "type", "param", "code"}
    assert body["message"] == str(error)


def test_what_a_client_needs_to_go_on():
    assert errors.overloaded(3).headers == {"Retry-After": "3"}
    assert "WWW-Authenticate" in errors.unauthorized().headers
    assert "abc" in errors.internal("abc").message
    message = errors.context_length_exceeded(100, 90, 20).message
    assert all(number in message for number in ("100", "90", "20"))
    assert len(errors.model_not_found("x" * 10_000).message) < 200


def test_an_error_passes_between_processes():
    error = errors.ApiError(429, "No.", type_="t", param="p", code="c", headers={"Retry-After": "1"})
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.status, copy.body(), copy.headers) == (error.status, error.body(), error.headers)
