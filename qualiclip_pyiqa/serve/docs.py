"""The page `/docs`: the app's OpenAPI description as HTML that loads nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from jinja2 import Environment


@dataclass(frozen=True)
class _Field:
    """A parameter of a request, or a property of an answer."""

    name: str
    type: str
    words: str


@dataclass(frozen=True)
class _Operation:
    method: str
    path: str
    summary: str
    words: str
    parameters: list[_Field]
    bodies: list[str]
    answers: list[_Field]


def docs_page(schema: dict[str, Any]) -> str:
    """Render an OpenAPI description."""
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        (files("qualiclip_pyiqa.serve") / "assets" / "docs.html").read_text("utf-8")
    )
    models = {
        name: [_Field(field, _type(each), each.get("description", "")) for field, each in model["properties"].items()]
        for name, model in schema["components"]["schemas"].items()
        if name.endswith("Answer")
    }
    return template.render(info=schema["info"], operations=list(_operations(schema)), models=models)


def _operations(schema: dict[str, Any]) -> Iterator[_Operation]:
    for path, methods in schema["paths"].items():
        for method, each in methods.items():
            body = each.get("requestBody", {})
            yield _Operation(
                method.upper(),
                path,
                each["summary"],
                " ".join(filter(None, [each.get("description"), body.get("description")])),
                [_Field(p["name"], _type(p["schema"]), p.get("description", "")) for p in each.get("parameters", [])],
                list(body.get("content", {})),
                [
                    _Field(status, ", ".join(_content(answer)), answer["description"])
                    for status, answer in each["responses"].items()
                    if answer["description"] != "Validation Error"
                ],
            )


def _content(answer: dict[str, Any]) -> Iterator[str]:
    """Yield the models of an answer, or its types of content."""
    for kind, content in answer.get("content", {}).items():
        model = _type(content.get("schema", {}))
        yield model if model.endswith("Answer") else kind


def _type(schema: dict[str, Any]) -> str:
    """Return a schema's type in a few words."""
    if "$ref" in schema:
        return str(schema["$ref"].rpartition("/")[2])
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_type(each) for each in schema["anyOf"]))
    if "enum" in schema:
        return " or ".join(map(repr, schema["enum"]))
    if schema.get("type") == "array":
        return f"list of {_type(schema['items'])}" if "items" in schema else "list"
    if "additionalProperties" in schema and isinstance(schema["additionalProperties"], dict):
        return f"{_type(schema['additionalProperties'])} by name"
    return str(schema.get("type", "any"))
