"""The messages about bodies that are refused."""

import json

import pytest
from pydantic import ValidationError

from pentad.serve.app import FIELDS
from pentad.serve.errors import refused_body
from pentad.serve.openai import ChatBody

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"messages": []}, "messages is a list of 0; expected at least 1 item"),
        ({"stop": "x" * 1001}, "expected at most 1000 characters"),
        ({"temperature": -1}, "temperature is -1; expected greater than or equal to 0"),
        ({"n": "two"}, "n is 'two'; expected a valid integer"),
        ({"mood": 1}, "mood is not supported; remove it"),
    ],
)
def test_a_message_says_what_is_wrong_and_what_is_expected(change: dict, message: str) -> None:
    body = json.dumps({"model": "tiny", "messages": HELLO, **change})
    with pytest.raises(ValidationError) as raised:
        ChatBody.model_validate_json(body)
    error = refused_body(raised.value, FIELDS)
    assert error.status == 400
    assert message in str(error)
    assert len(str(error)) < 200
