"""Each documented example is sent to the running service, which answers as the document says.

A resource that is added is tested by having examples. What only WeChat can give (codes, encrypted data, signatures)
comes from the simulator in place of the example's; ids, versions, times and tokens differ from those of the example.
"""

import json
import secrets
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import requests

from dev import openapi
from tests.blueprints.callers import each_operation
from tests.harness import WAIT_SECONDS, Service, Simulator, again_if_late, bearer

DOCUMENTS = {language: json.loads(path.read_text()) for language, path in openapi.PATHS.items()}
OPERATIONS = {
    language: {one["operationId"]: (method, path, one) for path, method, one in each_operation(document)}
    for language, document in DOCUMENTS.items()
}
NAMES = list(OPERATIONS["zh"])
ADMINISTRATOR = "oAdministratorOfTheExamples"
DIFFERS = {
    *("id", "user_id", "version", "created_at", "updated_at", "started", "built", "commit"),
    *("token", "expires_in", "app_id", "openid"),
}
"""Of these only the type is compared."""
MISSING = 10**17

each_language = pytest.mark.parametrize("language", DOCUMENTS)


class Client:
    """A user with the profile of the examples, who sends what the document says."""

    def __init__(self, service: Service, simulator: Simulator, language: str) -> None:
        self.service, self.simulator, self.language = service, simulator, language
        self.openid = f"o{secrets.token_hex(12)}"
        self.token = service.log_in(simulator, openid=self.openid)

    def fill(self, path: str) -> None:
        """Enter the personal data of the examples, one of all that users create, and one of the list at the path."""
        lists = [name for name in NAMES if self.operation(name)[:2] == ("post", path) or self.is_created(name)]
        for name in ("setProfile", "setPhone", "updatePersonalData", *lists):
            answer = self.send(name)
            assert answer.ok, answer.text

    def is_created(self, name: str) -> bool:
        """Whether users create something of their own by this operation, as an order."""
        method, path, operation = self.operation(name)
        is_administration = "administration" in operation["tags"]
        return method == "post" and "201" in operation["responses"] and "{" not in path and not is_administration

    def operation(self, name: str) -> tuple[str, str, dict[str, Any]]:
        return OPERATIONS[self.language][name]

    def token_for(self, name: str) -> str:
        """The user's token; an administrator's for what only these may do."""
        is_administration = "administration" in self.operation(name)[2]["tags"]
        return self.service.log_in(self.simulator, openid=ADMINISTRATOR) if is_administration else self.token

    def send(self, name: str, body: Any = None, **changed: Any) -> requests.Response:
        """Send the documented request, with these parameters and this body in place of the documented ones."""
        method, path, operation = self.operation(name)
        parameters = {part["name"]: part.get("example") for part in operation["parameters"]}
        if "requestBody" in operation and body is None:
            body = self.bodies(name)[0]
        in_path = [part for part in operation["parameters"] if part["in"] == "path"]
        ids = self.ids(path, in_path) | changed.pop("ids", {})
        headers = {"Accept-Language": self.language} | changed.pop("headers", {})
        if "metrics" in operation["tags"] and "Authorization" not in headers:
            headers |= bearer(self.service.environ["METRICS_TOKEN"])
        elif operation["security"] and "Authorization" not in headers:
            headers |= bearer(self.token_for(name))
        if "If-Match" in parameters and "If-Match" not in headers:
            read = requests.get(self.url(path.format(**ids)), headers=headers, timeout=WAIT_SECONDS)
            headers["If-Match"] = read.headers.get("ETag", "*")
        query = {part["name"]: part["example"] for part in operation["parameters"] if part["in"] == "query"}
        query |= {"user_id": self.me()["id"]} if "user_id" in query else {}
        query |= {"after": MISSING} if "after" in query else {}
        return requests.request(
            method,
            self.url(path.format(**ids)),
            params={**query, **changed.pop("query", {})},
            headers={name: value for name, value in headers.items() if value},
            timeout=WAIT_SECONDS,
            allow_redirects=False,
            **(changed or {"json": body}),
        )

    def url(self, path: str) -> str:
        return self.service.url + path

    def me(self) -> dict[str, Any]:
        found: dict[str, Any] = self.service.read_me(self.token).json()["data"]
        return found

    def ids(self, path: str, parameters: list[dict[str, Any]]) -> dict[str, Any]:
        """Create what the path names: a number is the id of something in the list before it."""
        found: dict[str, Any] = {}
        for part in parameters:
            found[part["name"]] = part["example"]
            if part["schema"]["type"] == "integer":
                collection = path.partition(f"/{{{part['name']}}}")[0]
                (create,) = [name for name in NAMES if self.operation(name)[:2] == ("post", collection)]
                created = self.send(create, ids=found, headers=bearer(self.token))
                assert created.status_code == 201, created.text
                found[part["name"]] = created.json()["data"]["id"]
        return found

    def bodies(self, name: str) -> list[Any]:
        """The documented bodies of a request, with what WeChat gave from the simulator."""
        content = self.operation(name)[2]["requestBody"]["content"]["application/json"]
        examples = [one["value"] for one in content.get("examples", {}).values()] or [content["example"]]
        return [self.from_wechat(name, body) for body in sorted(examples, key=lambda body: "encryptedData" in body)]

    def from_wechat(self, name: str, body: dict[str, Any]) -> dict[str, Any]:
        """Replace what only WeChat can give."""
        phone = self.documented("getFullPersonalData")["phone"]
        body = {**body, "openid": f"o{secrets.token_hex(12)}"} if "openid" in body else body
        if name == "logIn":
            return {"code": self.simulator.code(openid=self.openid)}
        if name == "setPhone" and "code" in body:
            return {"code": self.simulator.phone_code(openid=self.openid, phone=phone)}
        if name == "setPhone":
            data: dict[str, Any] = {"phoneNumber": phone, "purePhoneNumber": phone, "countryCode": "86"}
        elif "encryptedData" in body:
            typed = self.documented(name)
            data = {"openId": self.openid, "nickName": typed["nickname"], "avatarUrl": typed["avatar_url"]}
        else:
            return body
        made = self.simulator.user_data(self.openid, data)
        return {field: made[field] for field in body}

    def documented(self, name: str) -> Any:
        """The data that the document shows for a success."""
        responses = self.operation(name)[2]["responses"]
        (status,) = {"200", "201"} & responses.keys()
        return responses[status]["content"]["application/json"]["example"]["data"]


@pytest.fixture(scope="module")
def service(environ: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with ExitStack() as stack:
        service = Service({**environ, "ADMIN_OPENIDS": ADMINISTRATOR}, tmp_path_factory.mktemp("examples") / "output")
        stack.callback(service.discard)
        yield service


@pytest.fixture
def client(service: Service, simulator: Simulator, redis: Any, language: str) -> Client:
    return Client(service, simulator, language)


def assert_fits(documented: Any, actual: Any, where: str = "") -> None:
    """Whether an answer is the documented one but for what differs each time; a list may have more of the same."""
    if where.rpartition(".")[2] in DIFFERS:
        assert type(documented) is type(actual), where
    elif isinstance(documented, dict):
        assert documented.keys() == actual.keys(), where
        for name, value in documented.items():
            assert_fits(value, actual[name], f"{where}.{name}")
    elif isinstance(documented, list):
        assert len(actual) >= len(documented), where
        for one in documented:
            assert any(fits(one, other) for other in actual), (where, one, actual)
    elif where == ".data.total":  # of a list
        assert isinstance(actual, int), where
    else:
        assert documented == actual, where


def fits(documented: Any, actual: Any) -> bool:
    try:
        assert_fits(documented, actual)
    except AssertionError:
        return False
    return True


ELSEWHERE = {"beginWebLogin", "completeWebLogin", "verifyMessageUrl", "receiveMessage"}
"""Of browsers and of WeChat: tested below."""


@each_language
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ELSEWHERE])
def test_the_answer_is_the_documented_one(client: Client, name: str) -> None:
    _, path, operation = client.operation(name)
    (status,) = {"200", "201"} & operation["responses"].keys()
    response = operation["responses"][status]
    ((content_type, content),) = response["content"].items()
    client.fill(path)
    for body in client.bodies(name) if "requestBody" in operation else [None]:
        answer = client.send(name, body)
        assert answer.status_code == int(status), answer.text
        assert answer.headers["Content-Type"].partition(";")[0] == content_type
        assert response["headers"].keys() <= {*answer.headers}, name
        if content_type == "application/json":
            assert_fits(content["example"], answer.json())
        else:
            assert content["example"] in answer.text.splitlines()


@each_language
def test_the_login_on_the_web_is_the_documented_one(client: Client) -> None:
    client.simulator.web_user(openid=client.openid)
    browser = requests.Session()
    begun = client.send("beginWebLogin")
    assert (begun.status_code, begun.headers["Content-Type"].partition(";")[0]) == (302, "text/html")
    browser.headers["Cookie"] = begun.headers["Set-Cookie"].partition(";")[0]
    back = client.simulator.sign_in_on_the_web(begun.headers["Location"])
    ended = browser.get(back, allow_redirects=False, timeout=WAIT_SECONDS)
    wanted = {part["name"]: part["example"] for part in client.operation("beginWebLogin")[2]["parameters"]}
    assert (ended.status_code, ended.headers["Location"]) == (302, client.url(wanted["return_to"]))
    assert begun.text.startswith("<!doctype html>")


@each_language
def test_a_push_gets_the_documented_answer(client: Client) -> None:
    verified = client.simulator.verify_push(url=client.url("/api/v1/wechat/messages"))
    assert verified["status"] == 200
    post = client.operation("receiveMessage")[2]
    message = {**post["requestBody"]["content"]["application/json"]["example"], "MsgId": secrets.randbits(50)}
    (answer,) = client.simulator.push(
        {**message, "CreateTime": int(time.time())}, url=client.url("/api/v1/wechat/messages")
    )
    documented = post["responses"]["200"]["content"]["text/plain"]["example"]
    assert (answer["status"], answer["body"]) == (200, documented)


def failures() -> Iterator[tuple[str, int]]:
    """Each operation with each code that anybody can provoke without breaking anything."""
    for name, (_, _, operation) in OPERATIONS["zh"].items():
        responses = {} if name in ELSEWHERE else {**operation["responses"], "default": {}}
        for response in responses.values():
            for code in response.get("content", {}).get("application/json", {}).get("examples", {}):
                is_possible = {"403": "administration" in operation["tags"], "404": "{" in OPERATIONS["zh"][name][1]}
                if int(code) in PROVOKED and is_possible.get(code, True):
                    yield name, int(code)


PROVOKED: dict[int, dict[str, Any]] = {
    400: {"query": {"page": 0}, "data": b"[]"},
    401: {"headers": {"Authorization": "Bearer unknown"}},
    403: {},
    404: {},
    412: {"headers": {"If-Match": '"0"'}},
    413: {"data": b" " * (128 * 1024 + 1)},
    415: {"headers": {"Content-Type": "text/plain"}, "data": b"{}"},
    428: {"headers": {"If-Match": ""}},
    465: {"headers": {"Idempotency-Key": "the-same"}},
}


@pytest.mark.parametrize("language", ["en"])  # as the answers are Chinese above
@pytest.mark.parametrize(("name", "code"), list(failures()))
def test_a_failure_is_the_documented_one(client: Client, name: str, code: int) -> None:
    change = {**PROVOKED[code]}
    operation = client.operation(name)[2]
    if code == 404:
        last = [part["name"] for part in operation["parameters"] if part["in"] == "path"][-1]
        change = {"ids": {last: MISSING}, "headers": {"If-Match": "*"}}
    if code == 403:
        change = {"headers": bearer(client.token)}
    if code == 465:
        change["headers"] = {**change["headers"], "Authorization": f"Bearer {client.token_for(name)}"}
        assert client.send(name, **change).status_code in (200, 201)
        change["query"] = {"another": "request"}
    answer = client.send(name, **change)
    response = operation["responses"][str(answer.status_code)]
    documented = response["content"]["application/json"]["examples"][str(code)]["value"]
    actual = answer.json()
    assert (actual["code"], actual["message"]) == (documented["code"], documented["message"])
    assert type(actual["data"]) is type(documented["data"])
    assert response["headers"].keys() <= {*answer.headers}


@each_language
@pytest.mark.parametrize(
    ("code", "fault"),
    [
        (460, {"kind": "errcode", "errcode": 40029}),
        (461, {"kind": "errcode", "errcode": 40163}),
        (462, {"kind": "errcode", "errcode": 40226}),
        (502, {"kind": "not_json"}),
        (503, {"kind": "errcode", "errcode": -1}),
        (504, {"kind": "slow", "seconds": 30}),
        (520, {"kind": "errcode", "errcode": 40125}),
    ],
)
def test_a_failure_of_wechat_is_the_documented_one(client: Client, code: int, fault: dict[str, Any]) -> None:
    client.simulator.fault(times=10, **fault)
    headers = {"X-Request-Timeout": "1"} if code == 504 else {}
    answer = again_if_late(lambda: client.send("logIn", headers=headers), code)
    content = client.operation("logIn")[2]["responses"][str(answer.status_code)]["content"]["application/json"]
    assert answer.json() == content["examples"][str(code)]["value"]
