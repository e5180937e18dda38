"""Values that a JSON schema allows: what is valid, but that nobody would send."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import Any

from tests.fuzz.values import ODD_TEXTS

Schema = Mapping[str, Any]

MOST_TOKENS = 24
"""Of whole numbers without a bound, most of which count things that cost time."""


class Valid:
    """Draws values by the schemas of one OpenAPI document."""

    def __init__(self, document: Schema) -> None:
        self._schemas: Schema = document["components"]["schemas"]

    def resolved(self, schema: Schema) -> Schema:
        while "$ref" in schema:
            schema = self._schemas[schema["$ref"].rsplit("/", 1)[1]]
        return schema

    def value(self, schema: Schema, rng: Random, canary: str, depth: int = 0) -> Any:
        schema = self.resolved(schema)
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            return rng.choice(schema["enum"])
        for several in ("anyOf", "oneOf"):
            if several in schema:
                return self.value(self._one_of(schema, several, rng), rng, canary, depth + ("type" not in schema))
        kind = schema.get("type")
        if kind == "object":
            return self._object(schema, rng, canary, depth)
        if kind == "array":
            least = schema.get("minItems", 0)
            length = rng.randint(least, min(schema.get("maxItems", least + 3), least + 3))
            return [self.value(schema.get("items", {}), rng, canary, depth + 1) for _ in range(length)]
        return self._scalar(kind, schema, rng, canary)

    def _one_of(self, schema: Schema, several: str, rng: Random) -> Schema:
        """One of the alternatives, with what the schema says beside them; an object lacks what the others require."""
        chosen = self.resolved(rng.choice(schema[several]))
        if schema.get("type") != "object":
            return chosen
        own = {*chosen.get("required", ())}
        others = {name for each in schema[several] for name in each.get("required", ())} - own
        properties = {name: each for name, each in schema["properties"].items() if name not in others}
        rest = {key: value for key, value in schema.items() if key != several}
        return {**rest, "properties": properties, "required": [*schema.get("required", ()), *own]}

    def _object(self, schema: Schema, rng: Random, canary: str, depth: int) -> Any:
        required = schema.get("required", ())
        chance = 0.3 if depth else 0.5
        return {
            name: self.value(of, rng, canary, depth + 1)
            for name, of in schema.get("properties", {}).items()
            if name in required or (name != "model" and rng.random() < chance)
        }

    def _scalar(self, kind: str | None, schema: Schema, rng: Random, canary: str) -> Any:
        if kind == "boolean":
            return rng.random() < 0.5
        if kind == "integer":
            least = schema.get("minimum", schema.get("exclusiveMinimum", -1) + 1)
            return rng.randint(least, min(schema.get("maximum", least + MOST_TOKENS), least + MOST_TOKENS))
        if kind == "number":
            least = schema.get("minimum", schema.get("exclusiveMinimum", 0.0))
            return round(rng.uniform(least, schema.get("maximum", least + 2.0)), 3) or 0.5
        if kind == "null":
            return None
        return odd_text(rng, canary)


def odd_text(rng: Random, canary: str) -> str:
    return rng.choice(ODD_TEXTS) + rng.choice(("", f" {canary}"))
