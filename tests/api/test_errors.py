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
