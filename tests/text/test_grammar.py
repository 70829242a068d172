"""Constraints: the grammars that they are, and schemas whose keywords would not be enforced."""

from typing import Any

import pytest

from pentad.errors import BadInput
from pentad.text.grammar import Constraint


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"type": "array", "uniqueItems": True}, "schema.uniqueItems"),
        ({"properties": {"a": {"minLenght": 3}}}, "schema.properties.a.minLenght"),
        ({"$defs": {"x": {"anyOf": [{}, {"not": {}}]}}}, "schema.$defs.x.anyOf.1.not"),
        ({"items": {"if": {}}}, "schema.items.if"),
        ({"items": [True, {"contains": {}}]}, "schema.items.1.contains"),
        ({"type": "string", "nullable": True}, "schema.nullable"),
        ({"x-guidance": {"lenient": True}}, "schema.x-guidance"),
        ({"items": {"$id": "http://example.com/x"}}, "schema.items.$id"),
        ({"$schema": "http://example.com/mine"}, "schema.$schema"),
        ({"minProperties": 3, "required": ["a"]}, "schema.minProperties"),
        ({"properties": []}, "schema.properties"),
        ({"multipleOf": 9_999_991}, "schema"),
        ({"anyOf": [{"multipleOf": 997}, {"multipleOf": 0.01}]}, "schema"),
        ({"multipleOf": 1e300}, "schema"),
        ({"multipleOf": "three"}, "schema"),
        ({"items": 3}, "schema.items"),
        (True, "schema"),
        ([], "schema"),
        ({"const": {1, 2}}, "schema"),
        ({"const": float("nan")}, "schema"),
    ],
)
def test_a_schema_that_would_not_be_enforced_is_refused_by_name(schema: Any, named: str) -> None:
    with pytest.raises(BadInput) as raised:
        Constraint.json_schema(schema)
    message = str(raised.value)
    assert message.split()[0].rstrip(":") == named
    assert "\n" not in message


def test_names_of_properties_and_values_are_not_keywords() -> None:
    schema = {"properties": {"uniqueItems": {"const": {"not": 1}}, "if": {"enum": [{"contains": 2}]}}}
    assert Constraint.json_schema(schema) == Constraint.json_schema(dict(schema))


@pytest.mark.parametrize("texts", [[], [""], "abc", ["a", 3], None])
def test_a_choice_needs_texts(texts: Any) -> None:
    with pytest.raises(BadInput, match="choice"):
        Constraint.choice(texts)


def test_a_long_grammar_is_refused() -> None:
    with pytest.raises(BadInput, match="65,536"):
        Constraint.choice(["x" * 70_000])
    with pytest.raises(BadInput, match="string"):
        Constraint.regex(3)  # type: ignore[arg-type]
