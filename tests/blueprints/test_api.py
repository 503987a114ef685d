"""openapi.json matches the code, and responses match openapi.json."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from jsonschema import Draft202012Validator, FormatChecker

from blueprints.api import Blueprint, register
from blueprints.policies import administrators, logins, public, scrapers, session_holders, signed_in
from blueprints.users import MINI_PROGRAM_LOGIN_REQUIRED
from dev import compatibility, openapi
from errors import Code, Message
from tests.blueprints.callers import API, Caller, bodies, each_operation, ids_of, operation_of, operations
from tests.harness import Simulator

POLICIES = {policy.check for policy in (public, logins, signed_in, session_holders, administrators, scrapers)}


def test_every_route_belongs_to_a_group(app: Flask) -> None:
    assert {rule.endpoint.rpartition(".")[0] for rule in app.url_map.iter_rules()} == set(app.blueprints)


def test_every_group_has_one_policy(app: Flask) -> None:
    for group in app.blueprints.keys() - {"documents", "docs"}:  # the documents are for everybody
        hooks = app.before_request_funcs.get(group, [])
        assert len(POLICIES.intersection(hooks)) == 1, f"{group} has no policy, or several"


def test_secured_operations_require_a_session(client: FlaskClient) -> None:
    operations = list(each_operation(client.get("/openapi.json").get_json()))
    assert any(operation["security"] for _, _, operation in operations)
    for path, method, operation in operations:
        answer = client.open(re.sub(r"{\w+}", "1", path), method=method)
        assert (answer.status_code == 401) == bool(operation["security"]), (method, path)


@pytest.fixture(scope="module")
def documents(shared_app: Flask) -> dict[str, Any]:
    return openapi.make_documents(shared_app)


@pytest.mark.parametrize("language", ["zh", "en"])
def test_the_committed_documents_match_the_code(documents: dict[str, Any], language: str) -> None:
    made = documents[language]
    assert json.loads(openapi.PATHS[language].read_text()) == made, "run `make openapi`"
    assert made["openapi"] == "3.1.0"


def test_both_documents_say_the_same_but_for_the_language(documents: dict[str, Any]) -> None:
    assert list(compatibility.differences(documents["zh"], documents["en"])) == []


TEXTS = ("summary", "description", "message")


def test_each_document_has_one_language(documents: dict[str, Any]) -> None:
    def texts(part: Any, name: str = "") -> Any:
        if isinstance(part, dict):
            for key, value in part.items():
                yield from texts(value, key)
        elif isinstance(part, list):
            for one in part:
                yield from texts(one)
        elif isinstance(part, str) and name in TEXTS:
            yield part

    chinese, english = list(texts(documents["zh"])), list(texts(documents["en"]))
    assert len(chinese) == len(english) > 300
    assert [text for text in english if re.search("[一-鿿]", text)] == []
    assert [text for text in chinese if not re.search("[一-鿿]", text)] == []


def test_each_operation_says_all_that_a_client_needs(documents: dict[str, Any]) -> None:
    for language, document in documents.items():
        names = [operation["operationId"] for _, _, operation in each_operation(document)]
        assert len(names) == len(set(names)) >= 34
        for path, method, operation in each_operation(document):
            where = (language, method, path)
            assert re.fullmatch("[a-z]+([A-Z][a-z]+)*", operation["operationId"]), where
            assert operation["summary"], where
            assert operation["description"], where
            assert operation["tags"], where
            assert isinstance(operation["security"], list), where
            assert all("example" in one or one["name"] == "Idempotency-Key" for one in operation["parameters"]), where
            for content in operation.get("requestBody", {}).get("content", {}).values():
                assert content.get("example") or content["examples"], where
            for status, response in operation["responses"].items():
                assert response["description"], where
                assert "X-Trace-Id" in response["headers"], (where, status)
                assert status == "304" or all(
                    part.get("example") or part["examples"] for part in response["content"].values()
                )


def test_the_groups_are_in_the_order_of_a_reader(documents: dict[str, Any]) -> None:
    names = [tag["name"] for tag in documents["zh"]["tags"]]
    assert names[:4] == ["login", "sessions", "web_login", "users"]
    assert names.index("users") < names.index("orders") < names.index("messages")
    assert names[-3:] == ["messages", "health", "metrics"]


def test_request_schemas_refuse_unknown_fields(documents: dict[str, Any]) -> None:
    document = documents["en"]
    schemas = document["components"]["schemas"]
    for path, _, operation in each_operation(document):
        for content in operation.get("requestBody", {}).get("content", {}).values():
            for schema in content["schema"].get("oneOf", [content["schema"]]):
                is_ours = operation["tags"] != ["messages"]  # WeChat says what these hold
                assert not is_ours or schemas[schema["$ref"].rpartition("/")[2]]["additionalProperties"] is False, path
    assert "readOnly" not in json.dumps(document)


def test_every_example_fits_its_schema(documents: dict[str, Any]) -> None:
    for language, document in documents.items():
        count = 0
        for path, method, operation in each_operation(document):
            contents = [*operation.get("requestBody", {}).get("content", {}).values()]
            contents += [part for one in operation["responses"].values() for part in one.get("content", {}).values()]
            for part in [*contents, *operation["parameters"]]:
                examples = [one["value"] for one in part.get("examples", {}).values()]
                for example in examples + ([part["example"]] if "example" in part else []):
                    count += 1
                    schema = {**part["schema"], "components": document["components"]}
                    problems = list(Draft202012Validator(schema, format_checker=FormatChecker()).iter_errors(example))
                    assert problems == [], (language, method, path)
        assert count > 300


def test_each_error_names_its_codes_and_what_to_do(documents: dict[str, Any]) -> None:
    advice = openapi.advice()
    assert advice.keys() == set(Code)
    for language, index in (("zh", 0), ("en", 1)):
        seen = set()
        for path, _, operation in each_operation(documents[language]):
            has_advice = not openapi.NOT_FOR_MINI_PROGRAMS & {*operation["tags"]}
            for status, response in operation["responses"].items():
                if status < "400":
                    continue
                listed = re.findall(r"^- `(\d+)` (.+)$", response["description"], re.MULTILINE)
                codes = {code: text for code in Code for number, text in listed if code.number == int(number)}
                seen |= codes.keys()
                assert codes, (path, status)
                assert all(status in (str(code.status), "default") for code in codes), (path, status)
                for code, text in codes.items():
                    is_general = has_advice and code.message[index] in text
                    assert (advice[code][index] in text) == is_general, (path, status)
                examples = response["content"].get("application/json", {}).get("examples")
                for number, example in (examples or {}).items():
                    assert example["value"]["code"] == int(number)
                    assert f"`{number}` {example['value']['message']}" in response["description"]
                assert examples is None or examples.keys() == {str(code.number) for code in codes}, (path, status)
        assert seen == set(Code) - {Code.SUCCESS}


def test_the_policy_runs_before_the_hooks_of_the_group_itself(make_app: Callable[..., Flask]) -> None:
    app = make_app()
    group = Blueprint("group", __name__, title=Message("", ""))
    group.before_request(lambda: pytest.fail("reached without a session"))
    group.route("/", endpoint="view")(lambda: None)
    register(app, group, url_prefix="/group", auth=signed_in)
    assert app.test_client().get("/group/").status_code == 401


def test_requests_are_matched_at_the_host_that_they_name(make_app: Callable[..., Flask]) -> None:
    app = make_app()
    app.add_url_rule("/folder/", endpoint="docs.folder", view_func=lambda: "")
    client = app.test_client()
    moved = client.get("/folder?a=%C3%A9", environ_overrides={"HTTP_HOST": "shop.example:8443"})
    assert (moved.status_code, moved.headers["Location"]) == (308, "http://shop.example:8443/folder/?a=%C3%A9")
    for host in ("a..example", f"{'a' * 64}.example"):
        refused = client.get("/livez", environ_overrides={"HTTP_HOST": host})
        assert (refused.status_code, refused.get_json()["code"]) == (400, Code.INVALID_INPUT.number), host


def test_a_response_states_its_length(client: FlaskClient) -> None:
    whole, head = client.get("/livez"), client.head("/livez")
    assert whole.headers["Content-Length"] == head.headers["Content-Length"] == str(len(whole.data))
    assert not head.data


def test_the_document_lists_the_failures_of_an_operation(documents: dict[str, Any]) -> None:
    found = {operation["operationId"]: operation for _, _, operation in each_operation(documents["en"])}
    login, me = found["logIn"]["responses"], found["getUser"]["responses"]
    assert set(login) == {"200", "400", "403", "413", "429", "502", "503", "504", "default"}
    assert set(me) == {"200", "304", "401", "403", "404", "429", "503", "default"}
    assert {"412", "428"} <= set(found["updateUser"]["responses"])
    assert [part["name"] for part in found["updateUser"]["parameters"]] == ["user_id", "If-Match"]
    assert [part["name"] for part in found["createOrder"]["parameters"]] == ["Idempotency-Key"]
    assert list(found["createOrder"]["responses"]["409"]["content"]["application/json"]["examples"]) == ["409", "465"]
    assert list(login["400"]["content"]["application/json"]["examples"]) == ["400", "460", "461"]
    assert set(me["401"]["headers"]) == {"X-Trace-Id", "WWW-Authenticate"}
    assert set(me["503"]["headers"]) == {"X-Trace-Id", "Retry-After"}
    assert set(me["200"]["headers"]) == {"X-Trace-Id", "ETag"}
    assert set(found["createOrder"]["responses"]["201"]["headers"]) == {"X-Trace-Id", "ETag", "Location"}
    assert MINI_PROGRAM_LOGIN_REQUIRED.english in found["setPhone"]["responses"]["403"]["description"]


def test_bodies_that_go_together_in_sets_are_one_of_these(documents: dict[str, Any]) -> None:
    document = documents["en"]
    found = {operation["operationId"]: operation for _, _, operation in each_operation(document)}
    fields = {
        name: [
            sorted(document["components"]["schemas"][one["$ref"].rpartition("/")[2]]["properties"])
            for one in found[name]["requestBody"]["content"]["application/json"]["schema"]["oneOf"]
        ]
        for name in ("setPhone", "setProfile")
    }
    assert fields == {
        "setPhone": [["code"], ["encryptedData", "iv"]],
        "setProfile": [["avatar_url", "nickname"], ["encryptedData", "iv", "rawData", "signature"]],
    }


def test_patterns_are_anchored_at_both_ends(client: FlaskClient) -> None:
    patterns = list(find_patterns(client.get("/openapi.json").get_json()))
    assert len(patterns) > 3
    assert [pattern for pattern in patterns if not (pattern.startswith("^") and pattern.endswith("$"))] == []


def find_patterns(part: Any) -> Any:
    for value in part.values() if isinstance(part, dict) else part if isinstance(part, list) else []:
        yield from find_patterns(value)
    if isinstance(part, dict) and isinstance(part.get("pattern"), str):
        yield part["pattern"]


IN_URLS = {
    *("page", "page_size", "after", "sort", "status", "user_id"),
    *("return_to", "scope", "state", "code"),  # of OAuth2
    *("signature", "msg_signature", "timestamp", "nonce", "echostr"),  # of message push
}
"""Proxies and browsers keep URLs: nothing that is about a person may join these, and the ids of rows."""


def test_no_url_contains_personal_data(client: FlaskClient, app: Flask, simulator: Simulator) -> None:
    ids_of_rows = {name for rule in app.url_map.iter_rules() for name in re.findall(r"<id:(\w+)>", rule.rule)}
    for path, _, operation in each_operation(client.get("/openapi.json").get_json()):
        named = {part["name"] for part in operation.get("parameters", []) if part["in"] == "query"}
        assert named | set(re.findall(r"{(\w+)}", path)) <= IN_URLS | ids_of_rows, path
    admin = Caller(app, simulator, openid="oCaller", role="admin")
    ids = ids_of(admin)
    created = 0
    for route, body in bodies(simulator, "oCaller").items():
        method, path = route.format(**ids).split()
        if method == "POST":
            location = admin.post(path.removeprefix(API), body).headers.get("Location")
            created += location is not None
            assert re.fullmatch(r"(/api/v1(/[a-z-]+/\d+)+)?", location or ""), route
    assert created >= 2


def test_the_document_has_exactly_the_routes_that_are_served(app: Flask, client: FlaskClient) -> None:
    documented = {(path, method) for path, method, _ in each_operation(client.get("/openapi.json").get_json())}
    served = {
        (path, method.lower())
        for method, path in operations(app)
        if method != "HEAD" and not path.startswith(("/docs", "/openapi.json", "/api/auth/"))  # the last is an alias
    }
    assert documented == served


STREAMED = {"/api/v1/users/me/export"}


def test_reads_match_the_document_and_are_304_if_their_etag_is_known(
    client: FlaskClient, app: Flask, simulator: Simulator
) -> None:
    document = client.get("/openapi.json").get_json()
    admin = Caller(app, simulator, role="admin")
    ids = ids_of(admin)
    for path, method, operation in each_operation(document):
        schema = operation["responses"].get("200", {}).get("content", {}).get("application/json", {}).get("schema")
        if method == "get" and schema:
            answer = client.get(path.format(**ids), headers=admin.headers)
            assert_fits(answer.get_json(), schema, document)
            assert "X-Trace-Id" in answer.headers
            has_etag = bool(operation["security"]) and path not in STREAMED
            assert ("304" in operation["responses"]) == has_etag == ("ETag" in answer.headers), path
            if has_etag:
                assert_not_modified(admin, path.format(**ids).removeprefix("/api/v1"), answer.headers["ETag"])


def test_the_headers_of_writes_are_documented(client: FlaskClient, app: Flask, simulator: Simulator) -> None:
    document = client.get("/openapi.json").get_json()
    admin = Caller(app, simulator, openid="oCaller", role="admin")
    ids = ids_of(admin)
    tags = 0
    deletes_last = sorted(bodies(simulator, "oCaller").items(), key=lambda item: item[0].startswith("DELETE"))
    for route, body in deletes_last:
        if route != "DELETE /api/v1/users/{user_id}":
            method, path = route.split()
            answer = admin.call(method, path.format(**ids).removeprefix(API), body, If_Match="*")
            documented = operation_of(document, path, method.lower())["responses"][str(answer.status_code)]["headers"]
            for name in ("ETag", "Location", "X-Trace-Id"):
                assert (name in documented) == (name in answer.headers), (route, name)
            tags += "ETag" in documented
    assert tags >= 5


def assert_not_modified(user: Caller, path: str, etag: str) -> None:
    for method in ("GET", "HEAD"):
        known = user.call(method, path, If_None_Match=etag)
        assert (known.status_code, known.data, known.headers["ETag"]) == (304, b"", etag), path
        assert "X-Trace-Id" in known.headers
    assert user.get(path, If_None_Match='"another"').status_code == 200


ODD_VALUES = [None, 5, 1.5, True, "", " ", "\x00", "x" * 1000, "١", "wxfile://a", [], [5], [{}], [[]], {}, {"a": {}}]
VAGUE = {
    "String does not match expected pattern.",
    "Not a valid URL.",
    "Invalid value.",
    "Invalid input type.",
    "Invalid input.",
    "Unknown field.",
}
"""Defaults of marshmallow that do not say what would be right."""


def test_what_is_wrong_with_a_field_says_what_would_be_right(app: Flask, simulator: Simulator) -> None:
    document = app.test_client().get("/openapi.json").get_json()
    admin = Caller(app, simulator, openid="oCaller", role="admin")
    ids, reasons = ids_of(admin), set()
    for path, method, operation in each_operation(document):
        schema = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
        fields = document["components"]["schemas"].get(schema.get("$ref", "").rpartition("/")[2], {})
        if "messages" in path or method == "delete":
            continue
        queries = [part["name"] for part in operation.get("parameters", []) if part["in"] == "query"]
        for name in [*fields.get("properties", {}), *queries, "unheard_of"]:
            for value in ODD_VALUES if fields else ["", "x", "-1", "1.5", "9" * 30, "\x00"]:
                if fields:
                    local = path.format(**ids).removeprefix(API)
                    answer = admin.call(method.upper(), local, {name: value}, If_Match='"0"')
                else:
                    answer = app.test_client().open(
                        path.format(**ids), method=method, query_string={name: value}, headers=admin.headers
                    )
                if answer.status_code == 400 and answer.is_json:
                    errors = answer.get_json()["data"] and answer.get_json()["data"]["errors"]
                    assert ("data.errors" in answer.get_json()["message"]) == bool(errors), (path, name, value)
                    reasons |= set(each_reason(errors))
    assert len(reasons) > 15
    assert reasons & VAGUE == set()
    assert [reason for reason in reasons if not re.fullmatch(r"[A-Z][ -~]+\.|.*: .+", reason)] == []


def each_reason(errors: Any) -> Any:
    for part in errors.values() if isinstance(errors, dict) else errors or []:
        if isinstance(part, str):
            yield part
        else:
            yield from each_reason(part)


UNBOUNDED = {"rawData", "signature", "encryptedData", "iv"}
"""wechat/crypto.py bounds these."""


def test_every_field_of_a_body_is_bounded(client: FlaskClient) -> None:
    document = client.get("/openapi.json").get_json()
    schemas = document["components"]["schemas"]
    seen = set()

    def check(schema: dict[str, Any], name: str) -> None:
        schema = schemas[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
        types = schema.get("type", [])
        for field, value in schema.get("properties", {}).items():
            if field not in UNBOUNDED:
                seen.add(field)
                check(value, f"{name}.{field}")
        if "array" in types:
            assert "maxItems" in schema, name
            check(schema["items"], name)
        if "integer" in types:
            assert {"minimum", "maximum"} <= set(schema), name
        if "string" in types and "enum" not in schema:
            assert {"pattern", "format"} & set(schema), f"{name} takes any character, NUL too"
            assert "maxLength" in schema or re.search(r"\{\d+(,\d+)?\}", schema.get("pattern", "")), (
                f"{name} has no limit"
            )

    for path, method, operation in each_operation(document):
        body = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
        schema = body.get("schema", {})
        for one in schema.get("oneOf", [schema]):
            check(one, f"{method} {path}")
    assert seen >= {"remark", "items", "quantity", "nickname", "email"}


def assert_fits(value: Any, schema: dict[str, Any], document: dict[str, Any]) -> None:
    if "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    if schema.get("type") == "array":
        for item in value:
            assert_fits(item, schema["items"], document)
    if schema.get("type") == "object":
        assert set(schema.get("required", [])) <= set(value) <= set(schema.get("properties", value))
        for name, property_schema in schema.get("properties", {}).items():
            assert_fits(value[name], property_schema, document)
