"""Writes openapi.json (Chinese) and openapi.en.json (English) from the code: `make openapi`. A test compares them.

What it says of an operation is beside its view: the docstring (its first line is `中文 | English`; then each paragraph
belongs to the language that it is written in), what the decorators of blueprints/api.py note, and the fields of the
schemas with their examples. The docstring below a field describes it; that below a code in errors.py says what a client
should do.
"""

import ast
import base64
import inspect
import json
import re
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, cast

from apispec import APISpec
from apispec.ext.marshmallow import MarshmallowPlugin
from apispec.ext.marshmallow.openapi import OpenAPIConverter
from flask import Flask
from marshmallow import Schema, missing

import service
from blueprints import idempotency, messages
from blueprints.api import IF_MATCH_PATTERN, Blueprint
from blueprints.parsing import SMALL_BODY, UserIdConverter, openapi_path
from errors import HEADERS, Code, Message

ROOT = Path(__file__).resolve().parent.parent
PATHS = {"zh": ROOT / "openapi.json", "en": ROOT / "openapi.en.json"}

TITLE = Message("快上 Kuaishang：微信小程序后端", "Kuaishang: a backend for WeChat mini-programs")
DESCRIPTION = Message(
    "每个 JSON 响应都是 `{code, message, data}`，并带有 `X-Trace-Id`。"
    "`code` 是业务码：200 为成功，4xx 是调用方的问题，5xx 是服务端的问题。"
    "`message` 默认中文，`Accept-Language` 偏好英文时为英文。\n\n请求头 `X-Request-Timeout`（秒）限定服务端用时。",
    "Every JSON response is `{code, message, data}` and carries `X-Trace-Id`. `code` is the business code: 200 for "
    "success, 4xx if the request is at fault, 5xx if the service is. `message` is Chinese, or English where "
    "`Accept-Language` prefers it.\n\n`X-Request-Timeout` (seconds) in a request limits what the service spends on it.",
)
TABLE_HEAD = Message("| 业务码 | HTTP | 含义 | 客户端应当 |", "| code | HTTP | meaning | what the client should do |")
SECURITY = {
    "bearer": {
        "type": "http",
        "scheme": "bearer",
        "description": Message("登录返回的 token", "The token that login gave"),
    },
    "cookie": {
        "type": "apiKey",
        "in": "cookie",
        "name": "__Host-session",
        "description": Message(
            "供浏览器使用；明文 HTTP 下名为 `session`。带 cookie 的写请求须由本站页面发出，请求体须为 JSON。",
            "For browsers; over plain HTTP named `session`. A write by cookie must come from a page of this site, and "
            "its body must be JSON.",
        ),
    },
    "metrics": {
        "type": "http",
        "scheme": "bearer",
        "description": Message("METRICS_TOKEN，供 Prometheus", "METRICS_TOKEN, for Prometheus"),
    },
}
SCHEMAS = "#/components/schemas/"
TRACE_ID = "X-Trace-Id"
RESPONSE_HEADERS = {
    TRACE_ID: (Message("在日志中查找此请求", "Finds this request in the logs"), "4bf92f3577b34da6a3ce929d0e0e4736"),
    "ETag": (Message("版本，用作 If-Match、If-None-Match", "The version, for If-Match and If-None-Match"), '"1-zh"'),
    "Location": (Message("新资源或要前往的地址", "Where the new resource is, or where to go"), "/api/v1/orders/1"),
    "Retry-After": (Message("重试前等待的秒数", "Seconds to wait before retrying"), "2"),
    "RateLimit": (Message("剩余请求数 r，t 秒后恢复", "Requests left r, for t seconds"), '"session";r=0;t=3'),
    "RateLimit-Policy": (Message("w 秒内允许 q 个请求", "The limit: q requests in w seconds"), '"session";q=300;w=60'),
    "WWW-Authenticate": (Message("如何登录", "How to authenticate"), "Bearer"),
}
STATUS_HEADERS = {201: ["ETag", "Location"], 302: ["Location"], 429: ["RateLimit", "RateLimit-Policy"]}
"""Of the responses of a status, beside the trace id and `errors.HEADERS`."""

IF_MATCH = {
    "name": "If-Match",
    "in": "header",
    "required": True,
    "schema": {"type": "string", "pattern": f"^{IF_MATCH_PATTERN}$"},
    "example": '"1"',
    "description": Message(
        "读到的 `version`，加引号，或其 ETag；此后有变化则为 412",
        "The `version` that was read, quoted, or its ETag: 412 if it has changed since",
    ),
}
IDEMPOTENCY_KEY = {
    "name": "Idempotency-Key",
    "in": "header",
    "schema": {"type": "string", "pattern": f"^{idempotency.KEY_PATTERN}$"},
    "description": Message(
        "客户端选择的唯一值；24 小时内重复则返回首次的响应",
        "A unique key chosen by the client. Repeating it within 24 hours returns the first response.",
    ),
}
PUSH_PARAMETERS = {
    "signature": ("ab71e2cf6a7d94d0f0ac42ac1ff9b1a0c4a1f8b2", "^[0-9a-f]{40}$"),
    "timestamp": ("1764144000", "^[0-9]{1,20}$"),
    "nonce": ("486452656", "^[!-~]{1,128}$"),
}
"""What WeChat adds to the URL of a message and of the verification; wechat/message_push.py checks it."""
PUSH_BODY = {
    "ToUserName": "gh_97417a04a28d",
    "FromUserName": "oGZUI0egBJY1zhBYw2KhdUfwVJJE",
    "CreateTime": 1764144000,
    "MsgType": "text",
    "Content": "你好",
    "MsgId": 1234567890123456,
}
PUSH_TEXT = Message(
    "明文或加密消息，JSON 或 XML，见微信文档", "A plain or encrypted message, in JSON or XML, as WeChat documents"
)
PHRASES = {
    200: Message("成功", "Success"),
    201: Message("已创建", "Created"),
    302: Message("前往 Location", "Go to Location"),
    304: Message("与 If-None-Match 所给的版本相同", "Not modified since the version of If-None-Match"),
}
BODY_LIMIT = Message("最大 {} 字节", "At most {} bytes")
DEFAULT_ERROR = Message("其他错误，同样在信封中", "Any other error, in the envelope as well")


ERROR_ENVELOPE = {
    "type": "object",
    "description": Message("每个错误的响应体", "The body of every error"),
    "required": ["code", "message", "data"],
    "properties": {
        "code": {"type": "integer", "enum": [code.number for code in Code if code is not Code.SUCCESS]},
        "message": {"type": "string"},
        "data": {
            "type": ["object", "null"],
            "required": ["errors"],
            "properties": {
                "errors": {"type": "object", "description": Message("各字段的问题", "What is wrong, by field")},
            },
        },
    },
}
IN_PATHS = {
    "id": {"type": "integer", "format": "int64", "minimum": 1, "maximum": 10**18 - 1, "examples": [1]},
    "user": {"type": "string", "pattern": f"^({UserIdConverter.regex})$", "examples": ["me"]},
}
"""What the CONVERTERS of paths take, by their names."""
NOT_FOR_MINI_PROGRAMS = {"web_login", "messages", "metrics"}
"""Groups that browsers, WeChat and Prometheus call: what errors.py advises is for mini-programs."""


def make_app() -> Flask:
    """Make the application. The documents need no connection, so any well-formed settings do."""
    return service.create_app(
        {
            "WECHAT_APP_ID": "wx0123456789abcdef",
            "WECHAT_APP_SECRET": "none",
            "REDIS_URL": "redis://127.0.0.1",
            "DATABASE_URL": "sqlite:///none.db",
            "SECRET_KEY": "for the documents alone, no secret",
            "ENCRYPTION_KEYS": base64.b64encode(bytes(32)).decode(),
        }
    )


def make_documents(app: Flask) -> dict[str, Any]:
    """Make the documents of the application's API, by language."""
    document = _Document(app).make()
    return {language: _in_language(document, language) for language in PATHS}


def advice() -> dict[Code, Message]:
    """Return what a client should do about each code: the docstring below it in errors.py."""
    return {Code[name]: text for name, text in notes(Code).items()}


@cache
def notes(declared: type) -> dict[str, Message]:
    """Return the docstrings below the names that a class declares."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(declared))).body
    found, name = {}, ""
    for node in cast(ast.ClassDef, tree).body:
        match node:
            case ast.Assign(targets=[ast.Name(name)]):
                pass
            case ast.Expr(ast.Constant(str(text))) if name:
                found[name] = _both(text)
    return found


def _describe(converter: OpenAPIConverter, field: Any, **kwargs: Any) -> dict[str, Any]:
    """Describe a field of a schema by the docstring below it; without an example, its default is one."""
    declared_in = [one for one in type(field.parent).__mro__ if one.__module__.startswith("blueprints.")]
    texts = [text for one in declared_in if (text := notes(one).get(field.name))]
    has_default = field.load_default is not missing and "example" not in field.metadata
    example = {"example": field.load_default} if has_default else {}
    return example | ({"description": texts[0]} if texts else {})


def texts_of(view: Any) -> tuple[Message, Message]:
    """Return the summary and the description of a view: its docstring, in which each paragraph has one language."""
    first, *paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(view.__doc__ or ""))
    chinese: list[str] = []
    english: list[str] = []
    for paragraph in paragraphs:
        (chinese if re.search("[一-鿿]", paragraph) else english).append(_one_line(paragraph))
    return _both(first), Message("\n\n".join(chinese), "\n\n".join(english))


def operations(app: Flask) -> Iterator[tuple[str, str, Any, Blueprint, Any]]:
    """Return path, method, rule, group and view of each operation, in the order in which they are mounted.

    The alias of the login is none; nor are the documents themselves.
    """
    seen = set()
    groups = [group for group in app.blueprints.values() if isinstance(group, Blueprint)]
    for group in groups:
        for rule in app.url_map.iter_rules():
            if rule.endpoint.startswith(f"{group.name}.") and rule.endpoint not in seen:
                seen.add(rule.endpoint)
                (method,) = (rule.methods or set()) - {"HEAD", "OPTIONS"}
                path = openapi_path(rule)
                yield path, method.lower(), rule, group, app.view_functions[rule.endpoint]


def _one_line(text: str) -> str:
    """Join lines; without a blank between Chinese characters."""
    return " ".join(re.sub(r"(?<=[^\x00-\x7f])\s*\n\s*(?=[^\x00-\x7f])", "", text).split())


def _both(text: str) -> Message:
    chinese, _, english = _one_line(text).partition(" | ")
    if not (chinese and english):
        raise ValueError(f"not `中文 | English`: {text}")
    return Message(chinese, english)


def _in_language(part: Any, language: str) -> Any:
    """Replace the texts by those in one language, and leave empty ones out."""
    if isinstance(part, Message):
        return part.english if language == "en" else part.chinese
    if isinstance(part, dict):
        found = {name: _in_language(value, language) for name, value in part.items()}
        return {name: value for name, value in found.items() if name != "description" or value != ""}
    return [_in_language(value, language) for value in part] if isinstance(part, list) else part


def _name_of(schema: Any) -> str:
    return (schema if isinstance(schema, type) else type(schema)).__name__.removesuffix("Schema")


class _Document:
    """Gathers the document, with texts in both languages."""

    def __init__(self, app: Flask) -> None:
        self._app, self._advice = app, advice()
        plugin = MarshmallowPlugin(schema_name_resolver=_name_of)
        version = app.config["RELEASE"]["version"]
        self._spec = APISpec(title="", version=version, openapi_version="3.1.0", plugins=[plugin])
        self._convert = cast(OpenAPIConverter, plugin.converter)
        self._convert.add_attribute_function(_describe)
        self._schemas: dict[str, Any] = {"ErrorEnvelope": ERROR_ENVELOPE}
        """Beside those that apispec makes of our classes."""
        self._responses: dict[str, Any] = {}

    def make(self) -> dict[str, Any]:
        """Make the document."""
        paths: dict[str, Any] = {}
        tags = {}
        for path, method, rule, group, view in operations(self._app):
            paths.setdefault(path, {})[method] = self._operation(method, rule, group, view)
            tags[group.name] = {"name": group.name, "description": group.title}
        return {
            "openapi": "3.1.0",
            "info": {
                "title": TITLE,
                "version": self._app.config["RELEASE"]["version"],
                "description": Message(*map("\n\n".join, zip(DESCRIPTION, self._table(), strict=True))),
            },
            "servers": [{"url": "/"}],
            "tags": list(tags.values()),
            "paths": paths,
            "components": {
                "schemas": self._used(paths),
                "responses": self._responses,
                "securitySchemes": SECURITY,
            },
        }

    def _operation(self, method: str, rule: Any, group: Blueprint, view: Any) -> dict[str, Any]:
        documents, (summary, description) = view.documents, texts_of(view)
        parameters = [self._path_parameter(rule, name) for name in re.findall(r"[<:](\w+)>", rule.rule)]
        codes = [*group.auth.fails]
        operation: dict[str, Any] = {
            "operationId": re.sub("_(.)", lambda found: found[1].upper(), view.__name__),
            "tags": [group.name],
            "summary": summary,
            "description": description,
            "security": group.auth.security,
        }
        if query := documents.get("query"):
            parameters += [_parameter(one) for one in self._convert.schema2parameters(query, location="query")]
            codes += [Code.INVALID_INPUT]
        if body := documents.get("json"):
            codes += [Code.INVALID_INPUT, Code.PAYLOAD_TOO_LARGE]
            codes += [] if getattr(body, "ANY_CONTENT_TYPE", False) else [Code.UNSUPPORTED_MEDIA_TYPE]
            operation["requestBody"] = {
                "required": True,
                "description": Message(
                    *(text.format(getattr(body, "MAXIMUM_BYTES", SMALL_BODY)) for text in BODY_LIMIT)
                ),
                "content": {"application/json": self._body(body, documents["json_example"])},
            }
        if group.name == "messages":
            extra = {"echostr": ("5838479218127813673", "^[!-~]{1,1024}$")} if method == "get" else {}
            parameters += [_push_parameter(name, *of) for name, of in (PUSH_PARAMETERS | extra).items()]
            parameters += (
                []
                if method == "get"
                else [{**_push_parameter("msg_signature", *PUSH_PARAMETERS["signature"]), "required": False}]
            )
            if method == "post":
                operation["requestBody"] = {
                    "required": True,
                    "description": PUSH_TEXT,
                    "content": {
                        "application/json": {"schema": {"type": "object"}, "example": PUSH_BODY},
                        "text/xml": {"schema": {"type": "string"}, "example": _xml(PUSH_BODY)},
                    },
                }
        if method == "post" and documents["transaction"]:
            parameters.append(IDEMPOTENCY_KEY)
            codes += [Code.INVALID_INPUT, Code.IDEMPOTENCY_KEY_REUSED, Code.CONFLICT]
        if method in ("put", "delete") and documents["if_match"]:
            parameters.append(IF_MATCH)
            codes += [Code.PRECONDITION_REQUIRED, Code.PRECONDITION_FAILED, Code.CONFLICT]
        if "<" in rule.rule:
            codes.append(Code.NOT_FOUND)
        operation["parameters"] = parameters
        operation["responses"] = self._success(method, group, documents)
        if group.name == "messages" and method == "post":  # a responder's reply
            operation["responses"]["200"]["content"] |= operation["requestBody"]["content"]
        fails = documents.get("fails", {})
        # A message of its own stands beside that of the policy, which a user can get as well.
        of_policy = group.auth.fails if group.name not in NOT_FOR_MINI_PROGRAMS else ()
        pairs = [(code, code.message) for code in codes if code in of_policy or code not in fails]
        pairs = sorted(dict.fromkeys([*pairs, *fails.items()]), key=lambda pair: pair[0].number)
        limit = getattr(body, "MAXIMUM_BYTES", SMALL_BODY) if body else messages.MAXIMUM_BYTES
        for status in sorted({code.status for code, _ in pairs}):
            these = [(code, text) for code, text in pairs if code.status == status]
            operation["responses"][str(status)] = self._failure(status, these, group, limit)
        operation["responses"]["default"] = self._default(group)
        return operation

    def _path_parameter(self, rule: Any, name: str) -> dict[str, Any]:
        schema = IN_PATHS[re.search(rf"<(\w+):{name}>", rule.rule)[1]]  # type: ignore[index]
        return _parameter({"name": name, "in": "path", "required": True, "schema": schema})

    def _body(self, schema: Schema, example: dict[str, Any] | None) -> dict[str, Any]:
        """Describe the body of a request, with an example: of fields that go together in sets, one of each set."""
        name = _name_of(schema)
        given = getattr(schema, "GIVEN", None)
        reference = self._input(self._convert.resolve_nested_schema(schema))
        if not given:
            return {"schema": reference, "example": example or self._example(reference)}
        whole = self._schemas[_last(reference)]
        branches, examples = [], {}
        sets = {"Plain": schema.fields.keys() - given, "Encrypted": schema.fields.keys() & given}
        for suffix, names in sets.items():
            properties = {field: part for field, part in whole["properties"].items() if field in names}
            # All that WeChat gave together, or at least one of the others.
            needed = (
                {"required": list(properties)} if suffix == "Encrypted" or len(names) == 1 else {"minProperties": 1}
            )
            branch = {**whole, "properties": properties, **needed}
            self._schemas[name + suffix] = branch
            branches.append({"$ref": f"{SCHEMAS}{name}{suffix}"})
            examples[suffix.lower()] = {"value": self._example(branch)}
        return {"schema": {"oneOf": branches}, "examples": examples}

    def _input(self, schema: dict[str, Any]) -> dict[str, Any]:
        """Describe what a request may hold: not what the service sets, and nothing unknown."""
        if "$ref" not in schema:
            return {**schema, "items": self._input(schema["items"])} if "items" in schema else schema
        found, name = self._resolve(schema), _last(schema)
        kept = {field: one for field, one in found["properties"].items() if not one.get("readOnly")}
        kept = {field: self._input(one) for field, one in kept.items()}
        name += "Input" if kept != found["properties"] else ""
        required = [field for field in found.get("required", []) if field in kept]
        limits = {"properties": kept, "required": required, "additionalProperties": False}
        self._schemas[name] = {name: part for name, part in {**found, **limits}.items() if part != []}
        return {"$ref": f"{SCHEMAS}{name}"}

    def _success(self, method: str, group: Blueprint, documents: dict[str, Any]) -> dict[str, Any]:
        status, schema, is_secured = documents["status"], documents["schema"], bool(group.auth.security)
        if isinstance(schema, dict):
            described = schema
            content_type = documents["content_type"]
        else:
            described, content_type = self._envelope(schema), "application/json"
        content = {"schema": described, "example": self._example(described)}
        if example := documents.get("example"):
            content["example"] = {**content["example"], "data": {**content["example"]["data"], **example}}
        has_etag = status == 200 and is_secured and documents.get("etag", True) and method in ("get", "put")
        names = ["ETag"] if has_etag else []
        response = {
            "description": PHRASES[status],
            "headers": _headers(*names, *STATUS_HEADERS.get(status, [])),
            "content": {content_type: content},
        }
        responses = {str(status): response}
        if names and method == "get":
            responses["304"] = {"description": PHRASES[304], "headers": _headers("ETag")}
        return responses

    def _envelope(self, schema: type[Schema] | None) -> dict[str, Any]:
        """Describe the envelope around a schema, under a name of its own."""
        data: dict[str, Any] = {"type": "object", "maxProperties": 0, "examples": [{}]}
        if schema:
            data = self._convert.resolve_nested_schema(schema)
        name = f"{_name_of(schema) if schema else 'Empty'}Envelope"
        self._schemas[name] = {
            "type": "object",
            "required": ["code", "message", "data"],
            "properties": {
                "code": {"type": "integer", "enum": [Code.SUCCESS.number]},
                "message": {"type": "string", "examples": [Code.SUCCESS.message]},
                "data": data,
            },
        }
        return {"$ref": f"{SCHEMAS}{name}"}

    def _failure(self, status: int, pairs: list[tuple[Code, Message]], group: Blueprint, limit: int) -> dict[str, Any]:
        """Describe the errors of one status; once for all operations that have the same."""
        response = {
            "description": self._lines(pairs, group),
            "headers": _headers(*HEADERS.get(status, {}), *STATUS_HEADERS.get(status, [])),
            "content": _error_content(pairs, group, limit),
        }
        is_shared = group.name not in NOT_FOR_MINI_PROGRAMS and (status != 413 or limit == SMALL_BODY)
        if not is_shared or any(text is not code.message for code, text in pairs):
            return response
        name = "Error" + "And".join(str(code.number) for code, _ in pairs)
        self._responses[name] = response
        return {"$ref": f"#/components/responses/{name}"}

    def _default(self, group: Blueprint) -> dict[str, Any]:
        """Describe what any operation can answer: also to a malformed X-Request-Timeout, or when that has passed."""
        codes = (Code.INVALID_INPUT, Code.METHOD_NOT_ALLOWED, Code.INTERNAL_ERROR, Code.UNAVAILABLE)
        pairs = [(code, code.message) for code in codes]
        texts = zip(DEFAULT_ERROR, self._lines(pairs, group), strict=True)
        response = {
            "description": Message(*map("\n".join, texts)),
            "headers": _headers(),
            "content": _error_content(pairs, group, SMALL_BODY),
        }
        if group.name in NOT_FOR_MINI_PROGRAMS:
            return response
        self._responses["DefaultError"] = response
        return {"$ref": "#/components/responses/DefaultError"}

    def _lines(self, pairs: list[tuple[Code, Message]], group: Blueprint) -> Message:
        """List codes, what each means and what a mini-program should do, unless a message of its own says so."""
        lines: list[list[str]] = [[], []]
        for code, text in pairs:
            for n in (0, 1):
                is_general = text is code.message and group.name not in NOT_FOR_MINI_PROGRAMS
                advice = f" {self._advice[code][n]}" if is_general else ""
                lines[n].append(f"- `{code.number}` {text[n]}{'。.'[n]}{advice}")
        return Message(*map("\n".join, lines))

    def _table(self) -> Message:
        """Make a table of all codes."""
        rows = [
            Message(
                *(f"| {code.number} | {code.status} | {code.message[n]} | {self._advice[code][n]} |" for n in (0, 1))
            )
            for code in Code
        ]
        return Message(*("\n".join([TABLE_HEAD[n], "|---|---|---|---|", *(row[n] for row in rows)]) for n in (0, 1)))

    def _resolve(self, schema: dict[str, Any]) -> dict[str, Any]:
        """Follow a reference to a schema."""
        if "$ref" not in schema:
            return schema
        return self._schemas.get(_last(schema)) or cast(dict[str, Any], self._spec.components.schemas[_last(schema)])

    def _example(self, schema: dict[str, Any]) -> Any:
        """Compose the example of a schema from those of its fields."""
        schema = self._resolve(schema)
        if examples := schema.get("examples", [schema["example"]] if "example" in schema else []):
            return examples[0]
        if "properties" in schema:
            return {name: self._example(part) for name, part in schema["properties"].items()}
        return [self._example(schema["items"])] if "items" in schema else schema["enum"][0]

    def _used(self, part: Any) -> dict[str, Any]:
        """Return the schemas to which a part of the document refers, and those to which they refer, by name."""
        found: dict[str, Any] = {}
        rest = [part, self._responses]
        while rest:
            for name in sorted(_references(rest.pop()) - found.keys()):
                found[name] = _without_marks(self._resolve({"$ref": name}))
                rest.append(found[name])
        return dict(sorted(found.items()))


def _references(part: Any) -> set[str]:
    """Return the names of the schemas to which a part refers."""
    if isinstance(part, dict):
        here = {_last(part)} if str(part.get("$ref", "")).startswith(SCHEMAS) else set()
        return here.union(*map(_references, part.values()))
    return set().union(*map(_references, part)) if isinstance(part, list) else set()


def _without_marks(part: Any) -> Any:
    """Say `examples`, as OpenAPI 3.1 does, and leave out `readOnly`, as requests have schemas of their own."""
    if isinstance(part, dict):
        named = {"examples" if name == "example" else name: value for name, value in part.items() if name != "readOnly"}
        return {
            name: [value] if name == "examples" and "example" in part else _without_marks(value)
            for name, value in named.items()
        }
    return [_without_marks(one) for one in part] if isinstance(part, list) else part


def _last(reference: dict[str, Any]) -> str:
    return str(reference["$ref"]).rpartition("/")[2]


def _parameter(parameter: dict[str, Any]) -> dict[str, Any]:
    """Move the example of a parameter's schema to the parameter, where Swagger UI looks for it."""
    schema = dict(parameter["schema"])
    examples = schema.pop("examples", [schema.pop("example")] if "example" in schema else [])
    return {**parameter, "schema": schema, "example": examples[0]}


def _push_parameter(name: str, example: str, pattern: str) -> dict[str, Any]:
    schema = {"type": "string", "pattern": pattern}
    return {"name": name, "in": "query", "required": True, "schema": schema, "example": example}


def _xml(message: dict[str, Any]) -> str:
    return "<xml>" + "".join(f"<{name}><![CDATA[{value}]]></{name}>" for name, value in message.items()) + "</xml>"


def _headers(*names: str) -> dict[str, Any]:
    found = {name: RESPONSE_HEADERS[name] for name in (TRACE_ID, *names)}
    return {
        name: {"description": text, "required": True, "schema": {"type": "string", "examples": [example]}}
        for name, (text, example) in found.items()
    }


def _error_content(pairs: list[tuple[Code, Message]], group: Blueprint, limit: int) -> dict[str, Any]:
    """Describe the body of an error, with an example of each code, by its number."""
    if group.name == "web_login":  # whose errors are pages
        return {"text/html": {"schema": {"type": "string"}, "example": "<!doctype html>"}}
    examples: dict[str, Any] = {}
    for code, text in pairs:
        problems = {
            Code.INVALID_INPUT: {"errors": {"field": ["Must be a string."]}},
            Code.PAYLOAD_TOO_LARGE: {"errors": {"body": [f"At most {limit} bytes."]}},
        }
        value = {"code": code.number, "message": text, "data": problems.get(code)}
        examples.setdefault(str(code.number), {"value": value})
    return {"application/json": {"schema": {"$ref": f"{SCHEMAS}ErrorEnvelope"}, "examples": examples}}


def main() -> None:
    for language, document in make_documents(make_app()).items():
        PATHS[language].write_text(json.dumps(document, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    main()
