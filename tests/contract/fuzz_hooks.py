"""What Schemathesis cannot guess: real codes, ids, versions and signatures. fuzz.py has it loaded.

What is valid by the schema is made to succeed. One request in DELIBERATE is made to fail instead, by an outdated
version, a code unknown to WeChat, a wrong signature, or an id of somebody else's; then it must fail in just that way.
No other failure of valid input is excused, but for those that Schemathesis itself allows for: 401, 403, 404 and 409.

`Case._override` says what a link has set, as nothing public does; read against Schemathesis 4.32.5.
"""

import atexit
import json
import os
import time
import zlib
from collections import Counter
from collections.abc import Callable
from http.cookiejar import DefaultCookiePolicy
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import requests
import schemathesis
from schemathesis.core.failures import Failure
from schemathesis.core.parameters import ParameterLocation
from schemathesis.openapi.checks import RejectedPositiveData, UseAfterFree

from tests.harness import METRICS_TOKEN, PUSH_TOKEN, WAIT_SECONDS, Simulator
from wechat.crypto import push_signature

DELIBERATE = 8
TOO_LONG = ("414", "431")
"""What gunicorn responds to a URL, or to headers, of more bytes than it reads."""
V1 = "/api/v1"
PATH, QUERY, HEADER, BODY = (ParameterLocation(name) for name in ("path", "query", "header", "body"))
ITEM = {"sku": "A-1", "name": "茶", "quantity": 1, "unit_price": 100}
ENDS_THE_SESSION = {
    f"DELETE {V1}/auth/session",
    f"DELETE {V1}/auth/sessions",
    f"DELETE {V1}/users/{{user_id}}",
    f"GET {V1}/auth/wechat/callback",  # a login replaces the session that it is sent with
    f"POST {V1}/auth/wechat",
}


class World:
    """The running service and simulator, and who calls."""

    def __init__(self) -> None:
        self.caller, self.service = os.environ["FUZZ_CALLER"], os.environ["FUZZ_SERVICE"]
        self.simulator = object.__new__(Simulator)  # the one that runs
        self.simulator.url = os.environ["FUZZ_SIMULATOR"]
        self.http = requests.Session()
        self.http.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        logins = json.loads(Path(os.environ["FUZZ_LOGINS"]).read_text())["auth"]
        headers = {login["name"]: login["fixedHeaders"][0]["value"] for login in logins if login["name"] != "nobody"}
        self.authorization: str = headers.get(self.caller, "")
        self.ids = {name: self.read("/users/me", header)["id"] for name, header in headers.items()}
        self.peers_order = self.create_order(headers["peer"])
        self.expected: dict[str, set[int]] = {}
        """The statuses of a case that is made to fail, by its id."""
        self.answers: Counter[tuple[str, int]] = Counter()

    def call(self, method: str, path: str, authorization: str, body: Any = None) -> requests.Response:
        url, headers = f"{self.service}{V1}{path}", {"Authorization": authorization}
        return self.http.request(method, url, headers=headers, json=body, timeout=WAIT_SECONDS)

    def read(self, path: str, authorization: str) -> dict[str, Any]:
        """Return what is there, or nothing if the caller may not see it."""
        return self.call("GET", path, authorization).json()["data"] or {}

    def create_order(self, authorization: str) -> dict[str, Any]:
        answer = self.call("POST", "/orders", authorization, {"items": [ITEM, ITEM]})
        assert answer.status_code == 201, answer.text
        return answer.json()["data"]  # type: ignore[no-any-return]

    def log_in(self, **wanted: str) -> tuple[str, int]:
        """Log in as a new user, or as the one of an openid; returns the Authorization, and the user's id."""
        answer = self.call("POST", "/auth/wechat", "", {"code": self.simulator.code(**wanted)})
        assert answer.status_code == 200, answer.text
        login = answer.json()["data"]
        return f"Bearer {login['token']}", login["user"]["id"]

    def log_in_another(self) -> str:
        """Log in somebody with the same rights as the caller."""
        if self.caller == "user":
            return self.log_in()[0]
        authorization, self.ids["spare"] = self.log_in(openid="fuzz-spare-administrator")
        return authorization

    def write_figures(self) -> None:
        rows = [[operation, status, count] for (operation, status), count in self.answers.items()]
        Path(os.environ["FUZZ_FIGURES"]).write_text(json.dumps(rows))


world = World()
atexit.register(world.write_figures)


def is_valid(case: schemathesis.Case, *locations: ParameterLocation) -> bool:
    """Whether these parts of a request are as the schema wants them."""
    return case.meta is not None and not any(case.meta.is_negative_at(location) for location in locations)


def one_in(share: int, *values: object) -> bool:
    """Choose one request in so many, always the same ones."""
    return zlib.crc32(repr(values).encode()) % share == 0


@schemathesis.hook
def before_load_schema(context: schemathesis.HookContext, raw_schema: dict[str, Any]) -> None:
    """Let `default`, which documents every status, do so for requests alone that are too long for any operation."""
    for item in raw_schema["paths"].values():
        for name, operation in item.items():
            if name != "parameters" and (other := operation["responses"].pop("default", None)):
                operation["responses"] |= dict.fromkeys(TOO_LONG, other)


@schemathesis.hook
def before_call(context: schemathesis.HookContext, case: schemathesis.Case, kwargs: dict[str, Any]) -> None:
    if case.method != case.operation.method.upper():  # a method that is not documented
        return
    label = case.operation.label
    prepare, authorization = PREPARE.get(label), world.authorization
    if authorization and case.headers.get("Authorization") == authorization:
        prepare = prepare or PREPARE_OWN.get(label)
        if label in ENDS_THE_SESSION:
            authorization = case.headers["Authorization"] = world.log_in_another()
        elif label == "GET /metrics" and world.caller == "administrator":
            case.headers["Authorization"] = f"Bearer {METRICS_TOKEN}"
        if is_valid(case, PATH):
            set_order_id(case)
            set_user_id(case)
        if is_valid(case, PATH, HEADER):
            set_version(case, authorization)
    if "Idempotency-Key" in case.headers and is_valid(case, HEADER) and not one_in(DELIBERATE, case.id):
        case.headers["Idempotency-Key"] = case.id  # a new one
    if prepare and is_valid(case, BODY, QUERY):
        kwargs.update(prepare(case) or {})


def is_linked(case: schemathesis.Case, name: str) -> bool:
    """Whether a response to an earlier request gave the value, which stays then."""
    return name in case._override.path_parameters


def set_order_id(case: schemathesis.Case) -> None:
    """Name an order of the caller's that is pending, or deliberately the peer's."""
    ids = case.path_parameters
    if "order_id" not in ids or is_linked(case, "order_id") or one_in(DELIBERATE, ids, 1):
        return
    order = world.create_order(world.authorization)
    if one_in(DELIBERATE, ids, 2):
        order = world.peers_order
        if world.caller == "user":
            world.expected[case.id] = {404}
    ids["order_id"] = order["id"]
    if "item_id" in ids:
        ids["item_id"] = order["items"][0]["id"]


def set_user_id(case: schemathesis.Case) -> None:
    """Name a user who exists; for a user mostly `me`, for an administrator never one whom this run needs."""
    ids = case.path_parameters
    if "user_id" not in ids:
        return
    wanted, is_free = str(ids["user_id"]), not is_linked(case, "user_id")
    about_rights = isinstance(case.body, dict) and bool(case.body.keys() & {"role", "blocked"})
    if world.caller == "administrator":
        is_needed = wanted in map(str, world.ids.values()) or (wanted == "me" and about_rights)
        is_unknown = wanted != "me" and is_free and not one_in(DELIBERATE, wanted)
        if is_unknown or (is_needed and case.method in ("PUT", "DELETE")):
            ids["user_id"] = str(world.log_in()[1])
    elif wanted != "me" and is_free:
        is_foreign = one_in(DELIBERATE, wanted)
        ids["user_id"] = str(world.ids["peer"]) if is_foreign else "me"
        if is_foreign:
            world.expected[case.id] = {404}
    if about_rights and world.caller == "user" and is_valid(case, BODY):
        set_rights(case)


def set_rights(case: schemathesis.Case) -> None:
    """Leave out what only administrators may set, or deliberately not."""
    if one_in(DELIBERATE, case.body):
        world.expected[case.id] = {400}  # whoever it is about
    else:
        case.body = {name: value for name, value in case.body.items() if name not in ("role", "blocked")}


def set_version(case: schemathesis.Case, authorization: str) -> None:
    """Name the current version, or deliberately one that is not."""
    if "If-Match" not in case.headers:
        return
    path = case.formatted_path.removeprefix(V1).removesuffix("/personal-data")
    if version := world.read(path, authorization).get("version"):
        is_outdated = one_in(DELIBERATE, case.headers["If-Match"], case.body)
        case.headers["If-Match"] = f'"{version + 1000 * is_outdated}"'
        if is_outdated:
            world.expected.setdefault(case.id, {412, 409})  # 409 if the order is past its changes


def spoil(case: schemathesis.Case, name: str, value: str, *statuses: int) -> None:
    """Let a body fail; what Schemathesis put there may be from an earlier request, and right."""
    case.body = {**case.body, name: value}
    world.expected[case.id] = {*statuses}


def log_in(case: schemathesis.Case) -> None:
    if one_in(DELIBERATE, case.body):
        spoil(case, "code", f"unknown-{case.id}", 400)
    else:
        case.body["code"] = world.simulator.code()


def call_back(case: schemathesis.Case) -> None:
    """Go through WeChat's page as a browser does, up to the address at which it comes back."""
    if one_in(DELIBERATE, case.query):
        world.expected[case.id] = {400}
        return
    begun = world.http.get(f"{world.service}{V1}/auth/wechat/authorize", allow_redirects=False, timeout=WAIT_SECONDS)
    back = world.simulator.sign_in_on_the_web(begun.headers["Location"], agree="code" in case.query)
    case.query = dict(parse_qsl(urlsplit(back).query))
    case.cookies.update({cookie.name: cookie.value for cookie in begun.cookies})


def set_phone(case: schemathesis.Case) -> None:
    if one_in(DELIBERATE, case.body):
        name, value = ("code", f"unknown-{case.id}") if "code" in case.body else ("iv", "A" * 22 + "==")
        spoil(case, name, value, 400, 409)
    elif "code" in case.body:
        case.body["code"] = world.simulator.phone_code()
    else:
        data = {"phoneNumber": "13800138000", "purePhoneNumber": "13800138000", "countryCode": "86"}
        case.body = encrypted(case, data)


def set_profile(case: schemathesis.Case) -> None:
    if "rawData" not in case.body:
        return
    if one_in(DELIBERATE, case.body):
        spoil(case, "signature", "0" * 40, 400, 409)
    else:
        case.body = encrypted(case, {"nickName": "小明", "avatarUrl": "https://example.com/1.png"})


def encrypted(case: schemathesis.Case, data: dict[str, str]) -> dict[str, str]:
    """Have data encrypted by WeChat as it would be for the caller, with the fields that the case has."""
    made = world.simulator.user_data(f"fuzz-{world.caller}", data)
    return {name: made[name] for name in case.body if name in made}


def sign(case: schemathesis.Case) -> None:
    """Sign the query as WeChat does."""
    if one_in(DELIBERATE, case.query, case.body):
        case.query |= {"signature": "0" * 40}
        world.expected[case.id] = {400}
        return
    moment, nonce = str(int(time.time())), case.query["nonce"]
    case.query |= {"timestamp": moment, "signature": push_signature(PUSH_TOKEN, moment, nonce)}


def push(case: schemathesis.Case) -> dict[str, str] | None:
    """Send a message of just now, beside whatever else is in the body."""
    sign(case)
    message = {"MsgType": "text", "CreateTime": int(time.time()), "MsgId": time.time_ns()}
    if case.media_type != "text/xml":
        case.body = {**case.body, **message}
        return None
    elements = [f"<{name}>{value}</{name}>" for name, value in message.items()]
    return {"data": f"<xml>{''.join(elements)}</xml>"}  # as the schema of the XML is any string


Prepare = Callable[[schemathesis.Case], dict[str, str] | None]
PREPARE: dict[str, Prepare] = {
    f"POST {V1}/auth/wechat": log_in,
    f"GET {V1}/auth/wechat/callback": call_back,
    f"GET {V1}/wechat/messages": sign,
    f"POST {V1}/wechat/messages": push,
}
PREPARE_OWN: dict[str, Prepare] = {
    f"PUT {V1}/users/me/phone": set_phone,
    f"PUT {V1}/users/me/profile": set_profile,
}
"""Of a caller who is signed in."""


@schemathesis.hook
def after_call(context: schemathesis.HookContext, case: schemathesis.Case, response: Any) -> None:
    method = "" if case.method == case.operation.method.upper() else f"{case.method} on "
    world.answers[method + case.operation.label, response.status_code] += 1


@schemathesis.check
def fails_as_it_must(ctx: Any, response: Any, case: schemathesis.Case) -> None:
    expected = world.expected.get(case.id)
    if expected and case.meta and case.meta.generation.mode.is_positive:
        assert response.status_code in expected, f"{response.status_code} where only {sorted(expected)} would do"


@schemathesis.check
def deleted_is_gone(ctx: Any, response: Any, case: schemathesis.Case) -> None:
    path = case.formatted_path.removeprefix(V1)
    if case.method == "DELETE" and response.status_code == 200 and case.path_parameters and not path.endswith("/me"):
        again = world.call("GET", path, case.headers["Authorization"])
        assert again.status_code == 404, f"{again.status_code} after it was deleted"


@schemathesis.hook
def filter_failure(context: schemathesis.HookContext, failure: Failure, case: schemathesis.Case, response: Any) -> bool:
    """Excuse what was made to fail as it did; and `me`, whom a new login makes somebody else."""
    if isinstance(failure, RejectedPositiveData):
        return response.status_code not in world.expected.get(case.id, ())
    return not (isinstance(failure, UseAfterFree) and failure.free.endswith("/users/me"))
