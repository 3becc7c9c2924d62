"""Random JSON Schemas, and values that are valid for them; neither knows how schemas are lowered."""

import random
from typing import Any

MAX_DEPTH = 4
NAMES = [
    "a",
    "name",
    "names",
    "n",
    "größe",
    "日本",
    'say "hi"',
    "back\\slash",
    "tab\t",
    "line\nbreak",
    "😀",
    "\x01",
    "",
    "x y",
]
TEXTS = ["red", "green", 'quo"te', "back\\slash", "new\nline", "😀", "été", "", "null", "1", "\x1f", "a, b: c"]
# A pattern or format, and strings that have it.
PATTERNS = {
    "^[a-z]+$": ["a", "abc", "zzzzzz"],
    r"^\d{3}-\d{4}$": ["555-1234", "000-0000"],
    "^(?:yes|no|not sure)$": ["yes", "no", "not sure"],
    r"^[^\"\\]*$": ["", "plain", "é😀"],
    '^["\\\\\n]{1,3}$': ['"', "\\\n", '"\\"'],
    "b": ["b", "abc", "xx\nb"],
    "^a|z$": ["abc", "xyz"],
    r"^\S+@\S+$": ["me@here", "a@b@c"],
    r"^.{2,5}$": ["ab", '"""', "12345"],
}
FORMATS = {
    "date": ["2024-02-29", "1999-12-31", "0001-01-01"],
    "time": ["10:20:30Z", "23:59:59.123+01:30"],
    "date-time": ["2024-02-29T00:00:00Z", "1970-01-01T12:00:00.5-08:00"],
    "duration": ["P1D", "P1Y2M3DT4H5M6S", "PT5M", "P2W"],
    "email": ["a.b@example.com", "x@y.org"],
    "hostname": ["localhost", "a-b.example.org"],
    "ipv4": ["0.0.0.0", "255.249.199.99"],
    "ipv6": ["::", "::1", "fe80::1:2", "1:2:3:4:5:6:7:8", "1::8", "1:2:3:4:5:6:7::"],
    "uuid": ["123e4567-e89b-12d3-a456-426614174000"],
    "uri": ["https://example.com/a?b=c#d", "http://localhost:8080", "urn:isbn:0451450523", "mailto:a@b.c"],
    "unknown-to-all": ["anything", ""],
}


def random_schema(seed: int) -> dict[str, Any]:
    """A schema of many kinds, the same for the same seed."""
    rng = random.Random(seed)
    schema = _schema(rng, 0) if rng.random() < 0.5 else _object(rng, 0)
    if "$ref" in str(schema):
        schema["$defs"] = {
            "leaf": _scalar(rng),
            "tree": {
                "type": "object",
                "properties": {
                    "value": _scalar(rng),
                    "next": {"$ref": "#/$defs/tree"},
                    "children": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 3},
                },
                "required": ["value"],
            },
            "list/of~ours": {
                "anyOf": [{"type": "null"}, {"type": "array", "items": {"$ref": "#/$defs/list~1of~0ours"}}]
            },
        }
    return schema


def _schema(rng: random.Random, depth: int) -> dict[str, Any]:
    kinds = [_scalar, _scalar, _enum, _ref]
    if depth < MAX_DEPTH:
        kinds += [lambda r: _object(r, depth), lambda r: _array(r, depth), lambda r: _union(r, depth)]
    schema = rng.choice(kinds)(rng)
    if rng.random() < 0.2:
        schema |= {"title": "A title", "description": "What it is", "x-vendor": {"not": "a keyword"}}
    return schema


def _scalar(rng: random.Random) -> dict[str, Any]:
    return rng.choice([_string, _string, _integer, _number, lambda _: {"type": "boolean"}, lambda _: {"type": "null"}])(
        rng
    )


def _string(rng: random.Random) -> dict[str, Any]:
    match rng.randrange(5):
        case 0:
            return {"type": "string"}
        case 1:
            low = rng.randrange(4)
            return {"type": "string", "minLength": low, "maxLength": low + rng.randrange(20)}
        case 2:
            return {"type": "string", "pattern": rng.choice(list(PATTERNS))}
        case 3:
            return {"type": "string", "format": rng.choice(list(FORMATS))}
    return {"type": ["string", "null"], "minLength": rng.randrange(3)}


def _integer(rng: random.Random) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    low = rng.choice([0, 1, -1, -5, -128, 10, 99, 100, -(10**6), rng.randint(-(10**4), 10**4)])
    if rng.random() < 0.5:
        schema[rng.choice(["minimum", "exclusiveMinimum"])] = rng.choice([low, low + 0.5, float(low)])
    if rng.random() < 0.5:
        schema[rng.choice(["maximum", "exclusiveMaximum"])] = low + rng.choice([2, 9, 10, 100, 255, 12345, 10**9])
    if rng.random() < 0.15:
        schema["multipleOf"] = rng.choice([1, 2, 5, 7, 10, 1000, 12, 3.0])
        schema = {key: value for key, value in schema.items() if not key.lower().endswith("maximum")}
    return schema


def _number(rng: random.Random) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "number"}
    low = rng.choice([0, 1, -1, 0.1, -0.25, 3.14159, 99.99, -1000, round(rng.uniform(-50, 50), 3)])
    if rng.random() < 0.6:
        schema[rng.choice(["minimum", "exclusiveMinimum"])] = low
    if rng.random() < 0.6:
        schema[rng.choice(["maximum", "exclusiveMaximum"])] = low + rng.choice([0.5, 1, 0.125, 7.75, 1000])
    return schema


def _enum(rng: random.Random) -> dict[str, Any]:
    values = [*TEXTS, 1, 2.5, -3, 0, True, False, None, [1, "two"], {"k": "v", "l": [None]}, 1e20, 1e-7]
    chosen = rng.sample(values, rng.randint(1, 6))
    if rng.random() < 0.3:
        return {"const": chosen[0]}
    strings = [value for value in chosen if isinstance(value, str)]
    return {"type": "string", "enum": strings} if strings and rng.random() < 0.5 else {"enum": chosen}


def _ref(rng: random.Random) -> dict[str, Any]:
    name = rng.choice(["leaf", "leaf", "tree", "list~1of~0ours"])
    return {"$ref": f"#/$defs/{name}"} if rng.random() < 0.5 else {"allOf": [{"$ref": f"#/$defs/{name}"}], "default": 1}


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(NAMES, rng.randint(0, 5))
    schema: dict[str, Any] = {"type": "object", "properties": {name: _schema(rng, depth + 1) for name in names}}
    required = [name for name in names if rng.random() < 0.5]
    if required or rng.random() < 0.5:
        schema["required"] = rng.sample(required, len(required))
    match rng.randrange(5):
        case 0:
            schema["additionalProperties"] = _scalar(rng)
        case 1:
            schema["additionalProperties"] = True
        case 2:
            schema["additionalProperties"] = False
    if names and rng.random() < 0.1:
        schema["minProperties"] = 1
    if rng.random() < 0.1 and depth < MAX_DEPTH and "additionalProperties" not in schema:
        other = {"type": "object", "properties": {"added": _scalar(rng)}, "required": ["added"]}
        return {"allOf": [schema, other]}
    return schema


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "array"}
    if rng.random() < 0.3:
        schema["prefixItems"] = [_schema(rng, depth + 1) for _ in range(rng.randint(1, 3))]
        schema["items"] = rng.choice([False, {"type": "integer"}, {"type": "string"}])
    else:
        schema["items"] = _schema(rng, depth + 1)
    longest = len(schema.get("prefixItems", "1234")) if schema["items"] is False else 6
    if rng.random() < 0.5:
        schema["minItems"] = rng.randint(0, min(3, longest))
    if rng.random() < 0.5:
        schema["maxItems"] = rng.randint(schema.get("minItems", 0), longest)
    return schema


def _union(rng: random.Random, depth: int) -> dict[str, Any]:
    if rng.random() < 0.3:
        options = []
        for kind in rng.sample(["cat", "dog", "bird"], 2):
            option = _object(rng, depth + 1)
            while "allOf" in option:
                option = _object(rng, depth + 1)
            option["properties"] = {"kind": {"const": kind}} | option["properties"]
            option["required"] = ["kind", *option.get("required", [])]
            options.append(option)
        return {"oneOf": [*options, {"type": "null"}]}
    return {"anyOf": [_schema(rng, depth + 1) for _ in range(rng.randint(1, 3))]}


def random_value(schema: Any, root: dict[str, Any], rng: random.Random, depth: int = 0) -> Any:
    """A value that is valid for a schema of `random_schema`, and that lowering promises to allow.

    Optional parts are left out below MAX_DEPTH + 3.
    """
    schema, rest = _resolved(schema, root), depth > MAX_DEPTH + 3
    if schema is True or not schema:
        return rng.choice([1, "any", None, [1, [2]], {"x": {"y": []}}])
    for key in ("anyOf", "oneOf"):
        if key in schema:
            simple = sorted(schema[key], key=lambda option: len(str(option)))[:1] if rest else schema[key]
            return random_value(rng.choice(simple), root, rng, depth + 1)
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return rng.choice(schema["enum"])
    name = schema["type"] if isinstance(schema["type"], str) else rng.choice(schema["type"])
    match name:
        case "object":
            return _random_object(schema, root, rng, depth, rest)
        case "array":
            prefix = schema.get("prefixItems", [])
            low, high = schema.get("minItems", 0), schema.get("maxItems", 16)
            high = min(high, len(prefix)) if schema["items"] is False else high
            count = low if rest else rng.randint(low, min(high, low + 3))
            kinds = [prefix[i] if i < len(prefix) else schema["items"] for i in range(count)]
            return [random_value(kind, root, rng, depth + 1) for kind in kinds]
        case "string":
            if "pattern" in schema or "format" in schema:
                return rng.choice(PATTERNS[schema["pattern"]] if "pattern" in schema else FORMATS[schema["format"]])
            low = schema.get("minLength", 0)
            count = rng.choice([low, schema.get("maxLength", 256), rng.randint(low, schema.get("maxLength", low + 5))])
            return "".join(rng.choice('ab"\\\n\t\x00\x1f\x7fé日😀/<') for _ in range(count))
        case "integer" | "number":
            return _random_number(schema, name, rng)
        case "boolean":
            return rng.random() < 0.5
    return None


def _random_object(schema: dict[str, Any], root: dict[str, Any], rng: random.Random, depth: int, rest: bool) -> Any:
    properties, required = schema.get("properties", {}), schema.get("required", [])
    value = {}
    for name, kind in properties.items():
        if name in required or (not rest and rng.random() < 0.5):
            value[name] = random_value(kind, root, rng, depth + 1)
    extra = schema.get("additionalProperties")
    if extra and not rest:
        for name in ("other", *(other + "s" for other in properties), *(other[:-1] for other in properties)):
            if name not in properties and rng.random() < 0.3:
                value[name] = random_value(extra, root, rng, depth + 1)
    if not value and schema.get("minProperties"):
        name = next(iter(properties))
        value[name] = random_value(properties[name], root, rng, depth + 1)
    return value


def _random_number(schema: dict[str, Any], name: str, rng: random.Random) -> int | float:
    low = max(schema.get("minimum", -(10**15) + 1), schema.get("exclusiveMinimum", -(10**15)))
    high = min(schema.get("maximum", 10**15 - 1), schema.get("exclusiveMaximum", 10**15))
    step = schema.get("multipleOf", 1)
    for _ in range(1_000):
        near = rng.choice([low, high, 0, rng.uniform(low, high), rng.uniform(max(low, -1_000), min(high, 1_000))])
        value = round((near + rng.randint(-3, 3)) / step) * int(step) if name == "integer" else _short(near, rng)
        inside = schema.get("minimum", low) <= value <= schema.get("maximum", high)
        if inside and schema.get("exclusiveMinimum", low - 1) < value < schema.get("exclusiveMaximum", high + 1):
            return value
    raise AssertionError(f"no number found for {schema}")


def _short(near: float, rng: random.Random) -> int | float:
    value = round(near + rng.choice([0, 0.5, -0.5, 0.001, -0.001, 1]), rng.choice([0, 1, 2, 4]))
    return int(value) if abs(value) < 1e-3 or (value == value // 1 and rng.random() < 0.5) else value


def _resolved(schema: Any, root: dict[str, Any]) -> Any:
    """The schema without the $ref and allOf that `random_schema` writes."""
    while isinstance(schema, dict) and ("$ref" in schema or "allOf" in schema):
        if "$ref" in schema:
            name = schema["$ref"].removeprefix("#/$defs/").replace("~1", "/").replace("~0", "~")
            schema = root["$defs"][name]
        elif len(schema["allOf"]) == 1:
            schema = schema["allOf"][0]
        else:
            first, other = schema["allOf"]
            properties = first["properties"] | other["properties"]
            schema = {**first, "properties": properties, "required": [*first.get("required", []), *other["required"]]}
    return schema
