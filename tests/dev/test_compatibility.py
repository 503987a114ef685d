"""`make compatible` finds each change that breaks clients, and no other."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from datetime import date
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import pytest

import settings
from dev.compatibility import METHODS, NAMED, TEXTS, breaking_changes, differences, is_named, lines, markings
from tests.harness import ROOT

TODAY = date(2030, 6, 1)
SOON, LATER, PAST = "2030-06-15", "2030-09-01", "2030-05-01"
GONE = object()
DOCUMENT = json.loads((ROOT / "openapi.json").read_text())

BASE: dict[str, Any] = {
    "openapi": "3.1.0",
    "info": {"title": "Things", "version": "1"},
    "servers": [{"url": "/"}],
    "tags": [{"name": "things"}],
    "paths": {
        "/things/{thing_id}": {
            "parameters": [{"in": "path", "name": "thing_id", "required": True, "schema": {"type": "integer"}}],
            "post": {
                "operationId": "changeThing",
                "summary": "Change a thing",
                "tags": ["things"],
                "security": [{"bearer": []}],
                "parameters": [
                    {"in": "query", "name": "size", "schema": {"type": "integer", "maximum": 100, "default": 20}},
                    {"in": "query", "name": "sort", "schema": {"enum": ["up", "down"]}},
                    {"in": "header", "name": "If-Match", "schema": {"type": "string"}},
                ],
                "requestBody": {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Change"}}}},
                "responses": {
                    "200": {
                        "description": "OK",
                        "headers": {
                            "ETag": {"required": True, "schema": {"type": "string"}},
                            "Age": {"schema": {"type": "integer"}},
                        },
                        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Thing"}}},
                    },
                    "409": {
                        "description": "- `409` Conflict.\n- `465` Another request.",
                        "content": {
                            "application/json": {
                                "schema": {"$ref": "#/components/schemas/Error"},
                                "examples": {"409": {"value": {"code": 409}}, "465": {"value": {"code": 465}}},
                            }
                        },
                    },
                },
            },
        },
        "/ping": {"get": {"operationId": "ping", "responses": {"204": {"description": "OK"}}}},
    },
    "components": {
        "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer", "description": "A token."}},
        "schemas": {
            "Change": {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "minLength": 1, "maxLength": 50, "pattern": "^a", "default": "a"},
                    "note": {"type": ["string", "null"]},
                    "size": {"type": "integer", "minimum": 1, "exclusiveMaximum": 10, "multipleOf": 2},
                    "kind": {"enum": ["a", "b"]},
                    "tags": {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 5},
                    "more": {"type": "object", "additionalProperties": {"type": "string"}, "maxProperties": 5},
                    "any": {"anyOf": [{"$ref": "#/components/schemas/Cat"}, {"type": "null"}]},
                    "one": {"oneOf": [{"$ref": "#/components/schemas/Cat"}, {"$ref": "#/components/schemas/Dog"}]},
                    "all": {"allOf": [{"$ref": "#/components/schemas/Cat"}]},
                    "id": {"type": "integer", "readOnly": True},
                },
                "required": ["id", "name"],
                "additionalProperties": False,
            },
            "Thing": {
                "type": "object",
                "properties": {
                    "id": {"type": "integer", "minimum": 1, "maximum": 9},
                    "name": {"type": "string", "maxLength": 50, "pattern": "^a"},
                    "made": {"type": "string", "format": "date-time"},
                    "kind": {"enum": ["a", "b"]},
                    "pet": {
                        "oneOf": [{"$ref": "#/components/schemas/Cat"}, {"$ref": "#/components/schemas/Dog"}],
                        "discriminator": {"propertyName": "type"},
                    },
                    "parent": {"$ref": "#/components/schemas/Thing"},
                    "secret": {"type": "string", "writeOnly": True},
                    "parts": {"type": "array", "maxItems": 5, "items": {"$ref": "#/components/schemas/Thing"}},
                },
                "required": ["id", "name", "secret"],
                "additionalProperties": False,
            },
            "Error": {"type": "object", "properties": {"code": {"enum": [409, 465]}}, "required": ["code"]},
            "Cat": {"type": "object", "properties": {"meows": {"type": "boolean"}}},
            "Dog": {"type": "object", "properties": {"barks": {"type": "boolean"}}},
        },
    },
}

POST = "paths > /things/{thing_id} > post"
AT = "POST /things/{thing_id}"
CHANGE, THING = "components > schemas > Change", "components > schemas > Thing"
IN, OUT = f"{CHANGE} > properties", f"{THING} > properties"
REQUEST, OK = f"{POST} > requestBody", f"{POST} > responses > 200"
SIZE, SORT, IF_MATCH = (f"{POST} > parameters > {index}" for index in range(3))
REQUIRED_QUERY = {"in": "query", "name": "new", "required": True, "schema": {"default": 1}}
OPTIONAL_QUERY = {"in": "query", "name": "new", "schema": {"type": "integer"}}
UNANNOUNCED = "deprecated without an x-sunset at least 30 days from now"
DEPRECATED = {"deprecated": True, "x-sunset": LATER}

NOT_COMPARED = [
    "$anchor",
    "$comment",
    "$defs",
    "$id",
    "$schema",
    "description",
    "example",
    "examples",
    "externalDocs",
    "summary",
    "title",
    "xml",
]
BASE_NAME = BASE["components"]["schemas"]["Thing"]["properties"]["name"]

Edits = dict[str, Any]

BREAKS: dict[str, list[tuple[Edits, Edits, str]]] = {
    # by group: edits of the old document, edits of the new one on top of them, the line
    "schema structure": [
        (
            {f"{OUT} > parent > maxProperties": 5},
            {f"{OUT} > parent > maxProperties": 6},
            "Thing.parent: maxProperties 5 → 6",
        ),
        (
            {},
            {f"{IN} > one > oneOf > 1": {"$ref": "#/components/schemas/Thing"}},
            "Change.one: oneOf no longer has Dog",
        ),
        (
            {f"{IN} > one > oneOf": [{"type": "string", "maxLength": 9}, {"type": "integer"}]},
            {f"{IN} > one > oneOf > 0 > maxLength": 8},
            "Change.one oneOf 0: maxLength 9 → 8",
        ),
        (
            {f"{OUT} > made > allOf": [{"maxLength": 9}]},
            {f"{OUT} > made > allOf": []},
            'Thing.made: allOf no longer has {"maxLength": 9}',
        ),
        ({}, {f"{OUT} > parts > items": GONE}, 'Thing.parts[]: type "object" → none'),
        (
            {f"{OUT} > parts > patternProperties": {"^a": {"maxLength": 3}}},
            {f"{OUT} > parts > patternProperties": {}},
            "Thing.parts patternProperties ^a: maxLength 3 → none",
        ),
        (
            {f"{IN} > kind > not": {"enum": ["a"]}},
            {f"{IN} > kind > not > enum > 1": "b"},
            'Change.kind not: value "b" is new',
        ),
        ({}, {f"{IN} > one > oneOf > 1": GONE}, "Change.one: oneOf no longer has Dog"),
        ({}, {f"{IN} > any > anyOf > 0": GONE}, "Change.any: anyOf no longer has Cat"),
        ({}, {f"{IN} > all > allOf > 1": {"$ref": "#/components/schemas/Dog"}}, "Change.all: allOf has Dog now"),
        ({}, {f"{IN} > all > allOf": []}, "Change.all: allOf no longer has Cat"),
        ({}, {f"{OUT} > pet > oneOf > 2": {"$ref": "#/components/schemas/Thing"}}, "Thing.pet: oneOf has Thing now"),
        ({}, {f"{OUT} > pet > oneOf": GONE}, "Thing.pet: oneOf removed"),
        (
            {},
            {f"{OUT} > parent": {"anyOf": [{"$ref": "#/components/schemas/Thing"}, {"type": "null"}]}},
            'Thing.parent: anyOf has {"type": "null"} now',
        ),
        ({}, {f"{OUT} > pet > discriminator": GONE}, 'Thing.pet: discriminator {"propertyName": "type"} → none'),
        ({}, {f"{IN} > kind > not": {"const": "a"}}, "Change.kind not: any value → some"),
        (
            {f"{IN} > kind > not": {"const": "a"}},
            {f"{IN} > kind > not > const": "b"},
            'Change.kind not: value "a" removed',
        ),
        ({}, {f"{CHANGE} > if": {"required": ["note"]}}, "Change if.note: new and required"),
        ({}, {f"{IN} > more > additionalProperties": False}, "Change.more{}: not allowed now"),
        ({}, {f"{IN} > more > additionalProperties > maxLength": 9}, "Change.more{}: maxLength none → 9"),
        ({}, {f"{THING} > additionalProperties": True}, "Thing{}: allowed now"),
        ({}, {f"{IN} > tags > prefixItems": [{"const": "a"}]}, "Change.tags[0]: any value → some"),
        ({}, {f"{IN} > more > patternProperties": {"^a": False}}, "Change.more patternProperties ^a: not allowed now"),
        ({}, {f"{IN} > more > propertyNames": {"maxLength": 3}}, "Change.more propertyNames: maxLength none → 3"),
        ({}, {f"{IN} > more > dependentRequired": {"a": ["b"]}}, 'Change.more: dependentRequired none → {"a": ["b"]}'),
    ],
    "schema constraints": [
        ({f"{OUT} > id > multipleOf": 2}, {f"{OUT} > id > multipleOf": 3}, "Thing.id: multipleOf 2 → 3"),
        ({}, {f"{IN} > name > maxLength": 49}, "Change.name: maxLength 50 → 49"),
        ({}, {f"{IN} > note > maxLength": 500}, "Change.note: maxLength none → 500"),
        ({}, {f"{IN} > name > minLength": 2}, "Change.name: minLength 1 → 2"),
        ({}, {f"{IN} > size > minimum": 2}, "Change.size: minimum 1 → 2"),
        ({}, {f"{IN} > size > maximum": 1000}, "Change.size: maximum none → 1000"),
        ({}, {f"{IN} > size > exclusiveMaximum": 9.5}, "Change.size: exclusiveMaximum 10 → 9.5"),
        ({}, {f"{IN} > size > exclusiveMinimum": 1}, "Change.size: exclusiveMinimum none → 1"),
        ({}, {f"{IN} > size > multipleOf": 4}, "Change.size: multipleOf 2 → 4"),
        ({}, {f"{IN} > size > multipleOf": 3}, "Change.size: multipleOf 2 → 3"),
        ({}, {f"{IN} > tags > minItems": 2}, "Change.tags: minItems 1 → 2"),
        ({}, {f"{IN} > tags > maxItems": 4}, "Change.tags: maxItems 5 → 4"),
        ({}, {f"{IN} > tags > uniqueItems": True}, "Change.tags: uniqueItems false → true"),
        ({}, {f"{IN} > tags > items > maxLength": 9}, "Change.tags[]: maxLength none → 9"),
        ({}, {f"{IN} > tags > contains": {"maxLength": 9}}, "Change.tags contains: maxLength none → 9"),
        ({}, {f"{IN} > tags > minContains": 2}, "Change.tags: minContains 1 → 2"),
        ({}, {f"{IN} > more > minProperties": 1}, "Change.more: minProperties 0 → 1"),
        ({}, {f"{IN} > more > maxProperties": 4}, "Change.more: maxProperties 5 → 4"),
        ({}, {f"{IN} > name > pattern": "^b"}, 'Change.name: pattern "^a" → "^b"'),
        ({}, {f"{IN} > note > pattern": "^b"}, 'Change.note: pattern none → "^b"'),
        ({}, {f"{IN} > note > contentEncoding": "base64"}, 'Change.note: contentEncoding none → "base64"'),
        ({}, {f"{OUT} > name > maxLength": 51}, "Thing.name: maxLength 50 → 51"),
        ({}, {f"{OUT} > name > pattern": GONE}, 'Thing.name: pattern "^a" → none'),
        ({}, {f"{OUT} > id > minimum": 0}, "Thing.id: minimum 1 → 0"),
        ({}, {f"{OUT} > parts > maxItems": GONE}, "Thing.parts: maxItems 5 → none"),
    ],
    "schema type": [
        ({}, {f"{IN} > size > type": "string"}, 'Change.size: type "integer" → "string"'),
        (
            {f"{IN} > size > type": "number"},
            {f"{IN} > size > type": "integer"},
            'Change.size: type "number" → "integer"',
        ),
        ({}, {f"{IN} > note > type": "string"}, 'Change.note: type ["string", "null"] → "string"'),
        ({}, {f"{IN} > note > format": "email"}, 'Change.note: format none → "email"'),
        ({}, {f"{IN} > tags > items > type": "integer"}, 'Change.tags[]: type "string" → "integer"'),
        ({}, {f"{OUT} > id > type": "number"}, 'Thing.id: type "integer" → "number"'),
        ({}, {f"{OUT} > id > type": ["integer", "null"]}, 'Thing.id: type "integer" → ["integer", "null"]'),
        ({}, {f"{OUT} > id > type": GONE}, 'Thing.id: type "integer" → none'),
        ({}, {f"{OUT} > made > format": GONE}, 'Thing.made: format "date-time" → none'),
        ({}, {f"{OUT} > made > format": "date"}, 'Thing.made: format "date-time" → "date"'),
    ],
    "schema values": [
        ({}, {f"{IN} > kind > enum": ["a"]}, 'Change.kind: value "b" removed'),
        ({}, {f"{IN} > kind": {"const": "a"}}, 'Change.kind: value "b" removed'),
        ({}, {f"{IN} > note > enum": ["a"]}, "Change.note: any value → some"),
        ({}, {f"{IN} > name > default": "b"}, 'Change.name: default "a" → "b"'),
        ({}, {f"{IN} > name > default": GONE}, 'Change.name: default "a" → none'),
        ({}, {f"{OUT} > kind > enum": ["a", "b", "c"]}, 'Thing.kind: value "c" is new'),
        ({}, {f"{OUT} > kind > enum": GONE}, "Thing.kind: some values → any"),
        ({}, {"components > schemas > Error > properties > code > enum > 2": 530}, "Error.code: value 530 is new"),
    ],
    "schema lifecycle": [
        (
            {},
            {f"{OUT} > name > deprecated": True},
            f"Thing.name: {UNANNOUNCED}",
        ),
        (
            {},
            {f"{IN} > name > deprecated": True, f"{IN} > name > x-sunset": SOON},
            f"Change.name: {UNANNOUNCED}",
        ),
        (
            {f"{OUT} > kind": DEPRECATED},
            {f"{OUT} > kind > x-sunset": SOON},
            "Thing.kind: x-sunset 2030-09-01 → 2030-06-15",
        ),
        ({f"{OUT} > kind": DEPRECATED}, {f"{OUT} > kind > x-sunset": GONE}, "Thing.kind: x-sunset 2030-09-01 → none"),
        ({f"{OUT} > kind": DEPRECATED}, {f"{OUT} > kind": GONE}, "Thing.kind: removed before its x-sunset, 2030-09-01"),
    ],
    "schema existence": [
        ({}, {f"{IN} > note": GONE}, "Change.note: removed"),
        ({}, {f"{OUT} > made": GONE}, "Thing.made: removed"),
        ({}, {f"{OUT} > id": GONE, f"{THING} > required": ["name"]}, "Thing.id: removed"),
        ({}, {f"{IN} > new": {"default": 1}, f"{CHANGE} > required": ["name", "new"]}, "Change.new: new and required"),
        ({}, {f"{IN} > note > readOnly": True}, "Change.note: readOnly now"),
        ({}, {f"{OUT} > made > writeOnly": True}, "Thing.made: writeOnly now"),
    ],
    "schema requiredness": [
        ({}, {f"{CHANGE} > required": ["id", "name", "kind"]}, "Change.kind: required now"),
        ({f"{CHANGE} > required": []}, {f"{CHANGE} > required": ["name"]}, "Change.name: required now"),
        ({}, {f"{IN} > id > readOnly": GONE}, "Change.id: new and required"),
        ({}, {f"{THING} > required": ["id"]}, "Thing.name: optional now"),
    ],
    "parameters constraints": [
        (
            {SORT: {"in": "query", "name": "sort", "content": {"text/plain": {"schema": {"maxLength": 9}}}}},
            {f"{SORT} > content > text/plain > schema > maxLength": 8},
            f"{AT} query sort: maxLength 9 → 8",
        ),
        (
            {f"{SORT} > schema": GONE},
            {f"{SORT} > schema": {"type": "string"}},
            f'{AT} query sort: type none → "string"',
        ),
        ({}, {f"{SIZE} > schema > maximum": 50}, f"{AT} query size: maximum 100 → 50"),
        ({}, {f"{IF_MATCH} > schema > pattern": "^W"}, f'{AT} header If-Match: pattern none → "^W"'),
        (
            {f"{SORT} > allowEmptyValue": True},
            {f"{SORT} > allowEmptyValue": False},
            f"{AT} query sort: must not be empty now",
        ),
    ],
    "parameters values": [
        ({}, {f"{SORT} > schema > enum": ["up"]}, f'{AT} query sort: value "down" removed'),
        ({}, {f"{SIZE} > schema > default": 10}, f"{AT} query size: default 20 → 10"),
        ({}, {f"{SORT} > schema > default": "up"}, f'{AT} query sort: default none → "up"'),
    ],
    "parameters lifecycle": [
        (
            {},
            {f"{SORT} > deprecated": True},
            f"{AT} query sort: {UNANNOUNCED}",
        ),
        (
            {f"{SORT} > deprecated": True, f"{SORT} > x-sunset": LATER},
            {SORT: GONE},
            f"{AT} query sort: removed before its x-sunset, 2030-09-01",
        ),
    ],
    "parameters existence": [
        ({}, {SORT: GONE}, f"{AT} query sort: removed"),
        ({}, {f"{POST} > parameters > 3": REQUIRED_QUERY}, f"{AT} query new: new and required"),
        ({}, {f"{SORT} > name": "order", f"{SORT} > required": True}, f"{AT} query order: new and required"),
        ({}, {f"{IF_MATCH} > in": "cookie"}, f"{AT} header If-Match: removed"),
    ],
    "parameters type": [
        ({}, {f"{SORT} > allowReserved": True}, f"{AT} query sort: allowReserved false → true"),
        ({}, {f"{IF_MATCH} > style": "form"}, f'{AT} header If-Match: style "simple" → "form"'),
        ({}, {f"{SIZE} > schema > type": "string"}, f'{AT} query size: type "integer" → "string"'),
        (
            {},
            {"paths > /things/{thing_id} > parameters > 0 > schema > format": "int32"},
            f'{AT} path thing_id: format none → "int32"',
        ),
        (
            {},
            {f"{SORT} > explode": False},
            f"{AT} query sort: explode true → false",
        ),
        (
            {f"{SORT}": {"in": "query", "name": "sort", "content": {"text/plain": {}}}},
            {f"{SORT} > content": {"application/json": {}}},
            f"{AT} query sort: text/plain removed",
        ),
    ],
    "parameters requiredness": [
        ({}, {f"{SIZE} > required": True}, f"{AT} query size: required now"),
    ],
    "paths lifecycle": [
        ({}, {f"{POST} > deprecated": True}, f"{AT}: {UNANNOUNCED}"),
        (
            {},
            {f"{POST} > deprecated": True, f"{POST} > x-sunset": "in autumn"},
            f"{AT}: {UNANNOUNCED}",
        ),
        (
            {"paths > /ping > get > deprecated": True, "paths > /ping > get > x-sunset": LATER},
            {"paths > /ping": GONE},
            "GET /ping: removed before its x-sunset, 2030-09-01",
        ),
        (
            {f"{POST} > deprecated": True, f"{POST} > x-sunset": LATER},
            {f"{POST} > x-sunset": SOON},
            f"{AT}: x-sunset 2030-09-01 → 2030-06-15",
        ),
        ({f"{POST} > deprecated": True}, {POST: GONE}, f"{AT}: removed"),
    ],
    "paths existence": [
        ({}, {"paths > /ping": GONE}, "GET /ping: removed"),
        ({}, {"paths > /ping > get": GONE}, "GET /ping: removed"),
        ({}, {f"{POST} > operationId": "updateThing"}, f'{AT}: operationId changeThing → "updateThing"'),
        ({}, {f"{POST} > operationId": GONE}, f"{AT}: operationId changeThing → none"),
    ],
    "responses type": [
        ({}, {f"{OK} > content > application/json > schema": GONE}, f'{AT} response 200: type "object" → none'),
        ({}, {f"{OK} > content": {"text/html": {}}}, f"{AT} response 200: application/json removed"),
        ({}, {f"{OK} > content": GONE}, f"{AT} response 200: application/json removed"),
        (
            {},
            {f"{OK} > content > application/json > schema": {"type": "string"}},
            f'{AT} response 200: type "object" → "string"',
        ),
    ],
    "responses existence": [
        ({}, {OK: GONE}, f"{AT} response 200: removed"),
        ({}, {OK: GONE, f"{POST} > responses > 201": {"description": "Created"}}, f"{AT} response 201: new"),
        ({}, {f"{POST} > responses > 412": {"description": "- `412` Changed"}}, f"{AT} response 412: new"),
        (
            {},
            {f"{POST} > responses > 409 > description": "- `409` Conflict.\n- `465` Another request.\n- `463` Stale."},
            f"{AT} response 409: code 463 is new",
        ),
        (
            {},
            {f"{POST} > responses > 409 > content > application/json > examples > 466": {"value": {"code": 466}}},
            f"{AT} response 409: code 466 is new",
        ),
    ],
    "requestBody existence": [
        ({}, {REQUEST: GONE}, f"{AT} request: body removed"),
        (
            {},
            {"paths > /ping > get > requestBody": {"required": True, "content": {}}},
            "GET /ping request: body new and required",
        ),
    ],
    "requestBody type": [
        (
            {f"{REQUEST} > content > application/json > schema": GONE},
            {f"{REQUEST} > content > application/json > schema": {"type": "object"}},
            f'{AT} request: type none → "object"',
        ),
        ({}, {f"{REQUEST} > content": {"application/xml": {}}}, f"{AT} request: application/json removed"),
        (
            {},
            {f"{REQUEST} > content > application/json > schema": {"type": "array"}},
            f'{AT} request: type "object" → "array"',
        ),
        (
            {},
            {f"{REQUEST} > content > application/json > encoding": {"a": {"style": "form"}}},
            f"{AT} request: encoding of application/json changed",
        ),
    ],
    "requestBody requiredness": [
        ({}, {f"{REQUEST} > required": True}, f"{AT} request: body required now"),
    ],
    "headers type": [
        ({}, {f"{OK} > headers > Age > schema": GONE}, f'{AT} response 200 header Age: type "integer" → none'),
        (
            {},
            {f"{OK} > headers > Age > schema > type": "string"},
            f'{AT} response 200 header Age: type "integer" → "string"',
        ),
    ],
    "headers requiredness": [
        ({}, {f"{OK} > headers > ETag > required": False}, f"{AT} response 200 header ETag: optional now"),
    ],
    "headers existence": [
        ({}, {f"{OK} > headers > Age > deprecated": True}, f"{AT} response 200 header Age: {UNANNOUNCED}"),
        ({}, {f"{OK} > headers > ETag": GONE}, f"{AT} response 200 header ETag: removed"),
        ({}, {f"{OK} > headers > Age": GONE}, f"{AT} response 200 header Age: removed"),
    ],
    "components": [
        (
            {"components > schemas > Extra": {}},
            {"components > schemas > Extra": GONE},
            "Extra: schema removed; types of generated clients have its name",
        ),
        ({}, {"components > securitySchemes > bearer > scheme": "basic"}, "security scheme bearer: removed or changed"),
    ],
    "security": [
        (
            {},
            {"paths > /ping > get > security": [{"bearer": []}]},
            "GET /ping: no login is no longer enough to be let in",
        ),
        ({}, {"security": [{"bearer": []}]}, "GET /ping: no login is no longer enough to be let in"),
        ({}, {f"{POST} > security": [{"bearer": ["admin"]}]}, f"{AT}: bearer is no longer enough to be let in"),
        ({}, {f"{POST} > security": [{"bearer": [], "key": []}]}, f"{AT}: bearer is no longer enough to be let in"),
    ],
    "servers": [
        ({}, {"servers": [{"url": "/v2"}]}, "server /: removed"),
    ],
}

COMPATIBLE: list[tuple[Edits, Edits]] = [
    # edits of the old document, edits of the new one on top of them
    ({}, {f"{IN} > new": {"type": "string", "default": "a"}}),
    ({}, {f"{IN} > more > maxProperties": GONE, f"{IN} > name > maxLength": 51, f"{IN} > name > minLength": 0}),
    ({}, {f"{IN} > name > pattern": GONE, f"{IN} > size > multipleOf": 1, f"{IN} > size > exclusiveMaximum": 11}),
    ({}, {f"{IN} > kind > enum": ["a", "b", "c"], f"{IN} > note > type": GONE, f"{IN} > size > type": "number"}),
    ({}, {f"{IN} > one > oneOf > 2": {"type": "null"}, f"{CHANGE} > additionalProperties": True}),
    (
        {},
        {f"{IN} > size": {"anyOf": [BASE["components"]["schemas"]["Change"]["properties"]["size"], {"type": "null"}]}},
    ),
    ({}, {f"{CHANGE} > required": []}),
    ({}, {f"{IN} > id": GONE, f"{CHANGE} > required": ["name"]}),  # readOnly: clients do not send it
    ({}, {f"{IN} > more > additionalProperties": True}),
    ({}, {f"{OUT} > new": {"type": "string"}}),
    ({}, {f"{OUT} > new": {"type": "string"}, f"{THING} > required": ["id", "name", "secret", "new"]}),
    ({}, {f"{OUT} > name > maxLength": 49, f"{OUT} > id > minimum": 2, f"{OUT} > parts > maxItems": 4}),
    ({}, {f"{OUT} > kind > enum": ["a"], f"{OUT} > pet > oneOf > 1": GONE}),
    ({f"{OUT} > name > type": ["string", "null"]}, {f"{OUT} > name > type": "string"}),
    ({}, {f"{THING} > required": ["id", "name", "secret", "made"]}),
    ({}, {f"{OUT} > secret": GONE, f"{THING} > required": ["id", "name"]}),  # writeOnly: clients do not get it
    ({}, {f"{SIZE} > schema > maximum": 200, f"{SORT} > schema > enum": ["up", "down", "none"]}),
    ({}, {f"{POST} > parameters > 3": OPTIONAL_QUERY}),
    (
        {},
        {
            f"{POST} > parameters > 0": BASE["paths"]["/things/{thing_id}"]["post"]["parameters"][2],
            f"{POST} > parameters > 2": BASE["paths"]["/things/{thing_id}"]["post"]["parameters"][0],
        },
    ),
    ({}, {f"{IF_MATCH} > name": "if-match"}),
    ({f"{SIZE} > required": True}, {f"{SIZE} > required": False}),
    ({}, {"paths > /pong": {"get": {"operationId": "pong", "responses": {}}}}),
    ({}, {"paths > /ping > get > requestBody": {"content": {}}}),
    ({}, {f"{REQUEST} > content > application/xml": {}, f"{OK} > content > application/xml": {}}),
    ({}, {f"{POST} > responses > 409": GONE}),
    ({}, {f"{POST} > responses > 409 > description": "- `409` Somebody else was faster."}),
    ({}, {f"{OK} > content > application/json > example": {"code": 200}}),
    ({f"{OK} > content > application/json > schema": GONE}, {f"{OK} > content > application/json > schema": {}}),
    ({f"{OK} > headers > Age > schema": GONE}, {f"{OK} > headers > Age > schema": {"type": "integer"}}),
    ({}, {f"{SORT} > schema": GONE}),
    ({}, {f"{IN} > tags > items": GONE}),
    ({f"{IN} > one > oneOf": [True, {"type": "integer"}]}, {f"{IN} > one > oneOf": [{"type": "integer"}, True]}),
    ({f"{OUT} > id > readOnly": True}, {f"{OUT} > id > readOnly": GONE}),
    ({}, {f"{IN} > note > writeOnly": True}),
    ({f"{OUT} > kind > deprecated": True}, {f"{OUT} > kind > deprecated": GONE}),
    ({f"{IN} > note > deprecated": True}, {f"{IN} > note > deprecated": False}),
    ({}, {f"{OUT} > name > {keyword}": {"new": "New"} for keyword in NOT_COMPARED}),
    ({f"{OUT} > name > {keyword}": {"new": "New"} for keyword in NOT_COMPARED}, {OUT + " > name": BASE_NAME}),
    ({f"{IN} > more > default": {"a": 1, "b": 2}}, {f"{IN} > more > default": {"b": 2, "a": 1}}),
    ({f"{POST} > security": [{"bearer": ["a", "b"]}]}, {f"{POST} > security": [{"bearer": ["b", "a"]}]}),
    (
        {f"{IN} > one > oneOf": [{"type": "string", "description": "One"}, {"type": "integer"}]},
        {f"{IN} > one > oneOf": [{"type": "integer"}, {"type": "string", "description": "Other"}, True]},
    ),
    ({}, {f"{IN} > one > oneOf": GONE}),
    ({f"{IN} > one > type": "object"}, {f"{IN} > one > oneOf": GONE}),
    ({}, {f"{OUT} > parent > oneOf": [{"type": "object"}]}),
    ({f"{IN} > more > patternProperties": {"^a": {"maxLength": 3}}}, {f"{IN} > more > patternProperties": {}}),
    ({}, {f"{OK} > headers > Location": {"schema": {"type": "string"}}, f"{OK} > headers > Age > required": True}),
    ({}, {f"{POST} > security": [{"bearer": []}, {"cookie": []}]}),
    ({}, {f"{POST} > security": []}),
    ({}, {f"{POST} > security": [{}]}),
    ({"paths > /ping > get > operationId": GONE}, {"paths > /ping > get > operationId": "ping"}),
    ({}, {f"{POST} > deprecated": True, f"{POST} > x-sunset": LATER}),
    ({f"{POST} > deprecated": True, f"{POST} > x-sunset": SOON}, {f"{POST} > x-sunset": LATER}),
    ({"paths > /ping > get > deprecated": True, "paths > /ping > get > x-sunset": PAST}, {"paths > /ping": GONE}),
    ({f"{OUT} > made > deprecated": True, f"{OUT} > made > x-sunset": PAST}, {f"{OUT} > made": GONE}),
    ({f"{SORT} > deprecated": True, f"{SORT} > x-sunset": PAST}, {SORT: GONE}),
    (
        {},
        {
            f"{POST} > summary": "New",
            f"{POST} > description": "New",
            "info > title": "New",
            "tags": [],
        },
    ),
    ({}, {f"{IN} > name > description": "New", f"{IN} > name > examples": ["abc"], f"{IN} > name > title": "Name"}),
    ({}, {"components > schemas > New": {}, "components > securitySchemes > bearer > description": "New"}),
    ({}, {f"{IN} > tags > uniqueItems": False, f"{SORT} > style": "form", f"{OUT} > name > x-order": 1}),
]


def edited(document: dict[str, Any], edits: Edits) -> dict[str, Any]:
    """Return a copy with other values at these places, each as `key > key > index`, or without them."""
    document = deepcopy(document)
    for place, value in edits.items():
        *parents, last = [int(key) if key.isdecimal() and len(key) < 3 else key for key in place.split(" > ")]
        node = document
        for key in parents:
            node = node[key]  # type: ignore[index]
        if value is GONE:
            del node[last]  # type: ignore[arg-type]
        elif isinstance(node, list) and last == len(node):
            node.append(value)
        else:
            node[last] = deepcopy(value)  # type: ignore[index]
    return document


def broken(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return [line.partition(" (")[0] for line in lines(breaking_changes(old, new, TODAY))]


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [pytest.param(*one, id=f"{group}: {one[2]}") for group, ones in BREAKS.items() for one in ones],
)
def test_a_breaking_change_is_found(old: Edits, new: Edits, line: str) -> None:
    before = edited(BASE, old)
    assert broken(before, before) == []
    assert line in broken(before, edited(before, new))


@pytest.mark.parametrize(("old", "new"), COMPATIBLE)
def test_a_compatible_change_passes(old: Edits, new: Edits) -> None:
    before = edited(BASE, old)
    assert json.dumps(edited(before, new)) != json.dumps(before)
    assert broken(before, edited(before, new)) == []


def test_each_group_of_breaking_changes_has_a_seed() -> None:
    """The groups are oasdiff's, by what changes and in which respect, and two that it does not count as errors."""
    assert [group for group in BREAKS if not BREAKS[group]] == []
    respects = {
        "schema": "structure constraints type values lifecycle existence requiredness",
        "parameters": "constraints values lifecycle existence type requiredness",
        "paths": "lifecycle existence",
        "responses": "type existence",
        "requestBody": "existence type requiredness",
        "headers": "type requiredness existence",
    }
    groups = [f"{part} {respect}" for part, words in respects.items() for respect in words.split()]
    assert len(groups) == 23
    assert [*BREAKS] == [*groups, "components", "security", "servers"]


def test_what_is_broken_once_by_a_schema_is_one_line_with_all_operations() -> None:
    second = {"operationId": "again", "responses": BASE["paths"]["/things/{thing_id}"]["post"]["responses"]}
    before = edited(BASE, {f"paths > /{letter}": {"get": second} for letter in "abcd"})
    changes = breaking_changes(before, edited(before, {f"{OUT} > made": GONE}), TODAY)
    assert lines(changes) == [
        f"Thing.made: removed (response of {AT}, response of GET /a, response of GET /b and 2 more)"
    ]


@pytest.mark.parametrize("method", ["get", "put", "post", "delete", "options", "head", "patch", "trace"])
def test_each_method_is_compared(method: str) -> None:
    before = edited(BASE, {"paths > /ping": {method: {"responses": {}}}})
    assert broken(before, edited(before, {f"paths > /ping > {method}": GONE})) == [f"{method.upper()} /ping: removed"]


def test_a_change_is_one_line_where_it_can_be() -> None:
    assert broken(BASE, edited(BASE, {f"{OUT} > id": GONE, f"{THING} > required": ["name"]})) == ["Thing.id: removed"]
    type_changed = edited(BASE, {f"{REQUEST} > content > application/json > schema": {"type": "array"}})
    assert broken(BASE, type_changed) == [f'{AT} request: type "object" → "array"']


def test_a_renamed_path_parameter_is_one_line() -> None:
    parameters = edited(BASE, {"paths > /things/{thing_id} > parameters > 0 > name": "id"})["paths"]
    after = edited(BASE, {"paths > /things/{thing_id}": GONE, "paths > /things/{id}": parameters["/things/{thing_id}"]})
    assert broken(BASE, after) == [f"{AT}: path parameter renamed: /things/{{id}}"]


@pytest.mark.parametrize(
    "schemas",
    [
        {"A": {"properties": {"a": {"$ref": "#/components/schemas/A"}}}},
        {"A": {"items": {"$ref": "#/components/schemas/B"}}, "B": {"anyOf": [{"$ref": "#/components/schemas/A"}]}},
        {"A": {"allOf": [{"$ref": "#/components/schemas/A", "maxItems": 3}]}},
        {"A": {"not": {"$ref": "#/components/schemas/A"}}},
    ],
)
def test_cycles_end(schemas: dict[str, Any]) -> None:
    before = edited(BASE, {f"components > schemas > {name}": schema for name, schema in schemas.items()})
    before = edited(before, {f"{OUT} > a": {"$ref": "#/components/schemas/A", "description": "In a cycle."}})
    assert broken(before, before) == []
    after = edited(before, {"components > schemas > A > enum": [1]})
    assert broken(after, before) == ["A: some values → any"]


@pytest.mark.parametrize("reference", ["#/components/schemas/Nobody", "#/components/schemas/A", "other.json#/A"])
def test_a_reference_that_leads_nowhere_is_an_error(reference: str) -> None:
    after = edited(BASE, {"components > schemas > A": {"$ref": reference}, f"{OUT} > made": {"$ref": reference}})
    with pytest.raises(LookupError, match=re.escape(reference)):
        broken(BASE, after)


def test_references_to_other_components_are_followed() -> None:
    parts = {"parameters": {"Size": BASE["paths"]["/things/{thing_id}"]["post"]["parameters"][0]}}
    parts |= {"responses": {"OK/~": BASE["paths"]["/things/{thing_id}"]["post"]["responses"]["200"]}}
    parts |= {"requestBodies": {"Change": BASE["paths"]["/things/{thing_id}"]["post"]["requestBody"]}}
    parts |= {"headers": {"Age": {"schema": {"type": "integer"}}}}
    before = edited(BASE, {f"components > {kind}": named for kind, named in parts.items()})
    before["components"]["responses"]["OK/~"]["headers"]["Age"] = {"$ref": "#/components/headers/Age"}
    before = edited(
        before,
        {
            SIZE: {"$ref": "#/components/parameters/Size"},
            OK: {"$ref": "#/components/responses/OK~1~0"},
            REQUEST: {"$ref": "#/components/requestBodies/Change"},
        },
    )
    assert broken(BASE, before) == []
    after = edited(before, {"components > parameters > Size > required": True})
    after = edited(after, {"components > headers > Age > schema > type": "string"})
    after = edited(after, {"components > requestBodies > Change > required": True})
    assert broken(before, after) == [
        f"{AT} request: body required now",
        f'{AT} response 200 header Age: type "integer" → "string"',
        f"{AT} query size: required now",
    ]


CHANGELOG = """# Changelog

## 0.2.0

- Something new.
- **Breaking** `POST /orders request.remark`, `Order.items[]`: shorter; send less
  than before.

## 0.1.0

- **Breaking** `User`: gone.
"""


def test_markings_are_those_of_the_section() -> None:
    assert markings(CHANGELOG, "0.2.0") == ({"POST /orders request.remark", "Order.items[]"}, [])
    assert markings(CHANGELOG, "0.1.0") == ({"User"}, [])
    assert markings(CHANGELOG, "0.1") == (set(), [])


@pytest.mark.parametrize(
    "line",
    [
        "- **Breaking** `Order`",
        "- **Breaking** `Order`:",
        "- **Breaking** Order: gone.",
        "- **breaking** `Order`: gone.",
    ],
)
def test_a_marking_without_place_or_reason_is_malformed(line: str) -> None:
    assert markings(f"## 1\n\n{line}\n", "1") == (set(), [line])


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("Change", {"Thing.made", f"{AT} query size", "GET /ping"}),
        ("Change.tags", {"Change.name", "Thing.made", f"{AT} query size", "GET /ping"}),
        ("Change.tags[]", {"Change.name", "Thing.made", f"{AT} query size", "GET /ping"}),
        ("Change.name", {"Change.tags[]", "Thing.made", f"{AT} query size", "GET /ping"}),
        (f"{AT} query size", {"Change.name", "Change.tags[]", "Thing.made", "GET /ping"}),
        (AT, {"GET /ping"}),
        *((one, None) for one in ("POST", "Chang", "Change.", "Change.tag", "POST /things", "POST /", "GET /pin", "")),
    ],
)
def test_a_marking_excuses_what_it_names_and_no_more(name: str, left: set[str] | None) -> None:
    edits = {f"{IN} > name > maxLength": 9, f"{IN} > tags > items > maxLength": 9, f"{OUT} > made": GONE}
    edits |= {f"{SIZE} > schema > maximum": 9, "paths > /ping": GONE}
    changes = breaking_changes(BASE, edited(BASE, edits), TODAY)
    places = {"".join(change.place) for change in changes}
    assert places == {"Change.name", "Change.tags[]", "Thing.made", f"{AT} query size", "GET /ping"}
    assert {"".join(change.place) for change in changes if not is_named(change, {name})} == (
        places if left is None else left
    )


def test_a_schema_of_several_operations_is_excused_only_where_they_are_named() -> None:
    again = {"get": {"responses": BASE["paths"]["/things/{thing_id}"]["post"]["responses"]}}
    before = edited(BASE, {"paths > /again": again})
    changes = breaking_changes(before, edited(before, {f"{OUT} > made": GONE}), TODAY)
    assert [change.operation for change in changes] == [AT, "GET /again"]
    assert [change.operation for change in changes if not is_named(change, {AT})] == ["GET /again"]


@pytest.mark.parametrize(
    ("edits", "places"),
    [
        ({f"{IN} > name > description": "Other", f"{POST} > summary": "Other", "info > title": "Other"}, []),
        ({f"{POST} > responses > 409 > content > application/json > examples": {}}, []),
        ({f"{IN} > name > maxLength": 9}, ["/components/schemas/Change/properties/name/maxLength"]),
        ({f"{IN} > title": {}}, ["/components/schemas/Change/properties/title"]),
        ({f"{CHANGE} > required > 1": "note"}, ["/components/schemas/Change/required/1"]),
        ({f"{POST} > tags > 1": "more"}, ["/paths//things/{thing_id}/post/tags"]),
        ({f"{CHANGE} > additionalProperties": 0}, ["/components/schemas/Change/additionalProperties"]),
        ({"paths > /ping": GONE}, ["/paths//ping"]),
    ],
)
def test_two_languages_differ_only_in_their_texts(edits: Edits, places: list[str]) -> None:
    assert list(differences(BASE, edited(BASE, edits))) == places
    assert list(differences(edited(BASE, edits), BASE)) == places


def places_of(node: Any, at: tuple[Any, ...] = (), keys_are_names: bool = False) -> Iterator[tuple[Any, ...]]:
    """Yield where the document has a single value that is no text."""
    if isinstance(node, dict):
        for key, value in node.items():
            if keys_are_names or key not in TEXTS:
                yield from places_of(value, (*at, key), key in NAMED and not keys_are_names)
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from places_of(value, (*at, index))
    else:
        yield at


def another(value: Any, keyword: Any) -> Any:
    match value, keyword:
        case str(), "type":
            return "boolean" if value != "boolean" else "integer"
        case str(), "in":
            return "header" if value != "header" else "query"
        case str(), "$ref":
            return value.rpartition("/")[0] + "/Another"
        case str(), _:
            return f"{value}x"
        case bool(), _:
            return not value
        case _:
            return 1 if value is None else value + 1


def operations_by_schema() -> dict[str, tuple[str, str]]:
    """Return for each schema of the real document an operation that has it, by path and method."""
    found: dict[str, tuple[str, str]] = {}

    def visit(node: Any, operation: tuple[str, str]) -> None:
        for name in re.findall('"\\$ref": "#/components/(?:schemas|responses)/([^"]+)"', json.dumps(node)):
            if name not in found:
                found[name] = operation
                for kind in ("schemas", "responses"):
                    visit(DOCUMENT["components"].get(kind, {}).get(name, {}), operation)

    for path, item in DOCUMENT["paths"].items():
        for method in item.keys() & METHODS:
            visit(item[method], (path, method))
    return found


def test_any_change_of_the_real_document_is_found_in_one_direction() -> None:
    """Change each value of it in turn, and compare to and fro: nothing that clients see is left out."""
    operations = operations_by_schema()
    tried, missed = set(), []
    for place in places_of(DOCUMENT):
        match place:
            case ("paths", path, method, *rest) if method in METHODS and rest[0] != "tags":
                pass
            case ("components", "schemas" | "responses", name, *rest) if name in operations:
                path, method = operations[name]
                rest = [name, *rest]
            case _:
                continue
        if tuple(rest) in tried or place[-1] == "readOnly":  # of what only responses have it says nothing
            continue
        tried.add(tuple(rest))
        item = {"parameters": DOCUMENT["paths"][path].get("parameters", []), method: DOCUMENT["paths"][path][method]}
        components = {kind: {**named, "Another": {}} for kind, named in DOCUMENT["components"].items()}
        before = {"paths": {path: item}, "components": components}
        after = changed(before, place)
        if not broken(before, after) and not broken(after, before):
            parent = reduce(getitem, place[:-1], DOCUMENT)
            if not (isinstance(parent, dict) and parent.get("readOnly")):  # in a schema of requests, nobody sees it
                missed.append(place)
    assert broken(DOCUMENT, deepcopy(DOCUMENT)) == []
    assert len(tried) > 500
    assert missed == []


def changed(node: Any, place: tuple[Any, ...]) -> Any:
    """Return it with another value at this place; what is beside the place is not copied."""
    key, *rest = place
    node = list(node) if isinstance(node, list) else dict(node)
    node[key] = changed(node[key], tuple(rest)) if rest else another(node[key], key)
    return node


DOCUMENT_409 = {"content": {"application/json": {"examples": {"470": {"value": {"code": 470}}}}}}
ORDERS, SCHEMAS = "paths > /api/v1/orders", "components > schemas"
NEW_ORDER, ORDER, ITEM = (f"{SCHEMAS} > {name} > properties" for name in ("OrderInput", "Order", "Item"))
LIST, CREATE = f"{ORDERS} > get", f"{ORDERS} > post"
REAL = [
    ({f"{NEW_ORDER} > remark > maxLength": 300}, "OrderInput.remark: maxLength 500 → 300"),
    ({f"{NEW_ORDER} > items > maxItems": 50}, "OrderInput.items: maxItems 100 → 50"),
    ({f"{NEW_ORDER} > items > items": {"type": "string"}}, 'OrderInput.items[]: type "object" → "string"'),
    ({f"{NEW_ORDER} > items > default": []}, "OrderInput.items: default none → []"),
    ({f"{NEW_ORDER} > remark": GONE}, "OrderInput.remark: removed"),
    ({f"{NEW_ORDER} > remark > readOnly": True}, "OrderInput.remark: readOnly now"),
    ({f"{NEW_ORDER} > remark > deprecated": True}, f"OrderInput.remark: {UNANNOUNCED}"),
    ({f"{SCHEMAS} > OrderInput > required": ["items", "remark"]}, "OrderInput.remark: required now"),
    ({f"{SCHEMAS} > OrderInput > allOf": [{"maxProperties": 1}]}, "OrderInput: allOf new"),
    ({f"{ORDER} > total": GONE}, "Order.total: removed"),
    ({f"{ORDER} > status > enum > 5": "lost"}, 'Order.status: value "lost" is new'),
    ({f"{ORDER} > remark > type": ["string", "null", "object"]}, "Order.remark: type"),
    ({f"{ITEM} > quantity > type": "number"}, 'Item.quantity: type "integer" → "number"'),
    ({f"{SCHEMAS} > Order > required": []}, "Order.id: optional now"),
    ({f"{SCHEMAS} > ErrorEnvelope > properties > code > enum > 0": 470}, "ErrorEnvelope.code: value 470 is new"),
    ({f"{LIST} > parameters > 0 > required": True}, "GET /api/v1/orders query page: required now"),
    ({f"{LIST} > parameters > 0 > schema > maximum": 9}, "GET /api/v1/orders query page: maximum 1000 → 9"),
    ({f"{LIST} > parameters > 0 > schema > default": 2}, "GET /api/v1/orders query page: default 1 → 2"),
    (
        {f"{LIST} > parameters > 0 > schema > type": "string"},
        'GET /api/v1/orders query page: type "integer" → "string"',
    ),
    ({f"{LIST} > parameters > 0 > deprecated": True}, f"GET /api/v1/orders query page: {UNANNOUNCED}"),
    ({f"{LIST} > parameters > 0": GONE}, "GET /api/v1/orders query page: removed"),
    ({CREATE: GONE}, "POST /api/v1/orders: removed"),
    ({f"{CREATE} > deprecated": True}, f"POST /api/v1/orders: {UNANNOUNCED}"),
    ({f"{CREATE} > operationId": "order"}, 'POST /api/v1/orders: operationId createOrder → "order"'),
    ({f"{CREATE} > tags": ["shop"]}, "POST /api/v1/orders: first tag"),
    ({f"{CREATE} > security": [{"cookie": []}]}, "POST /api/v1/orders: bearer is no longer enough to be let in"),
    ({f"{CREATE} > requestBody": GONE}, "POST /api/v1/orders request: body removed"),
    ({f"{CREATE} > requestBody > content": {}}, "POST /api/v1/orders request: application/json removed"),
    ({f"{LIST} > requestBody": {"required": True, "content": {}}}, "GET /api/v1/orders request: body new and required"),
    ({f"{CREATE} > responses > 201": GONE}, "POST /api/v1/orders response 201: removed"),
    ({f"{CREATE} > responses > 418": {"description": "- `418` Tea."}}, "POST /api/v1/orders response 418: new"),
    ({f"{CREATE} > responses > 409": DOCUMENT_409}, "POST /api/v1/orders response 409: code 470 is new"),
    ({f"{CREATE} > responses > 201 > content": {}}, "POST /api/v1/orders response 201: application/json removed"),
    ({f"{CREATE} > responses > 201 > headers > ETag": GONE}, "POST /api/v1/orders response 201 header ETag: removed"),
    (
        {f"{CREATE} > responses > 201 > headers > ETag > schema": {}},
        "POST /api/v1/orders response 201 header ETag: type",
    ),
    ({f"{SCHEMAS} > Version": GONE, f"{SCHEMAS} > VersionEnvelope > properties > data": {}}, "Version: schema removed"),
]


@pytest.mark.parametrize(("edits", "line"), REAL)
def test_a_break_of_the_real_document_is_found(edits: Edits, line: str) -> None:
    found = broken(DOCUMENT, edited(DOCUMENT, edits))
    assert [one for one in found if one.startswith(line)], found


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., tuple[int, list[str]]]:
    """Run it on a copy of the tree, with other documents and another changelog."""
    (tmp_path / "dev").mkdir()
    for name in ("settings.py", "dev/compatibility.py"):
        shutil.copy(ROOT / name, tmp_path / name)

    def run(released: Any, document: Any, english: Any, marking: str = "") -> tuple[int, list[str]]:
        named = {"dev/openapi.released.json": released, "openapi.json": document, "openapi.en.json": english}
        for name, content in named.items():
            (tmp_path / name).write_text(json.dumps(content))
        (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n## {settings.VERSION}\n\n{marking}\n")
        command = [sys.executable, "-m", "dev.compatibility"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.stderr == ""
        return done.returncode, done.stdout.splitlines()

    return run


def test_the_command(run: Callable[..., tuple[int, list[str]]]) -> None:
    shorter = edited(BASE, {f"{IN} > name > maxLength": 9})
    change, hint = f"Change.name: maxLength 50 → 9 (request of {AT})", "If clients have to bear it"
    assert run(BASE, BASE, BASE) == (0, ["compatible with the document of the last release, 1"])
    status, printed = run(BASE, shorter, shorter)
    assert (status, printed[0], len(printed)) == (1, change, 2)
    assert printed[1].startswith(hint)
    assert run(BASE, shorter, shorter, "- **Breaking** `Change.name`: cut names to 9 characters.")[0] == 0
    malformed = "- **Breaking** Change.name: cut names."
    status, printed = run(BASE, shorter, shorter, malformed)
    assert (status, printed[0].endswith(malformed), printed[1]) == (1, True, change)
    place = "/components/schemas/Change/properties/name/maxLength"
    assert run(BASE, BASE, shorter) == (1, [f"openapi.en.json is not as openapi.json: {place}"])


def test_the_tree_is_compatible_with_the_last_release() -> None:
    done = subprocess.run([sys.executable, "-m", "dev.compatibility"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout


@pytest.mark.parametrize("kind", sorted(NAMED))
@pytest.mark.parametrize("name", ["description", "example", "title"])
def test_what_is_called_like_a_text_is_compared(kind: str, name: str) -> None:
    assert list(differences({kind: {name: {}}}, {kind: {}})) == [f"/{kind}/{name}"]
    assert list(differences({kind: {"a": {name: 1}}}, {kind: {"a": {}}})) == []
    assert {"properties", "schemas", "responses", "headers", "content", "paths", "patternProperties"} <= NAMED
