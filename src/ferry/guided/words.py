"""The keywords of JSON Schema, drafts 4 to 2020-12: what each is to us."""

NUMBER_WORDS = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"})
TEXT_WORDS = frozenset({"minLength", "maxLength", "pattern", "format"})
ARRAY_WORDS = frozenset(
    {"items", "prefixItems", "additionalItems", "minItems", "maxItems", "uniqueItems", "contains", "minContains",
     "maxContains"}
)  # fmt: skip
OBJECT_WORDS = frozenset(
    {"properties", "patternProperties", "additionalProperties", "required", "minProperties", "maxProperties",
     "propertyNames", "dependentRequired"}
)  # fmt: skip
LOGIC_WORDS = frozenset(
    {"type", "enum", "const", "$ref", "allOf", "anyOf", "oneOf", "not", "if", "then", "else", "dependentSchemas",
     "dependencies"}
)  # fmt: skip
UNEVALUATED_WORDS = frozenset({"unevaluatedItems", "unevaluatedProperties"})
REFUSED_WORDS = frozenset({"$dynamicRef", "$recursiveRef"})
ANNOTATIONS = frozenset(
    {"$schema", "$id", "id", "$anchor", "$dynamicAnchor", "$recursiveAnchor", "$comment", "$defs", "definitions",
     "$vocabulary", "title", "description", "default", "examples", "example", "deprecated", "readOnly", "writeOnly",
     "contentMediaType", "contentEncoding", "contentSchema", "externalDocs", "xml", "discriminator"}
)  # fmt: skip
ENFORCED = NUMBER_WORDS | TEXT_WORDS | ARRAY_WORDS | OBJECT_WORDS | LOGIC_WORDS | UNEVALUATED_WORDS | REFUSED_WORDS
DRAFTS = (
    "https://json-schema.org/draft/2020-12/schema",
    "https://json-schema.org/draft/2019-09/schema",
    "http://json-schema.org/draft-07/schema",
    "http://json-schema.org/draft-06/schema",
    "http://json-schema.org/draft-04/schema",
)
