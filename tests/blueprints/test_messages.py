import errno
import json
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any
from unittest.mock import Mock

import gevent
import pytest
from flask import Flask
from flask.testing import FlaskClient
from redis import Redis
from redis.exceptions import RedisError
from sqlalchemy import event as sqlalchemy_event
from sqlalchemy import make_url
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session
from sqlalchemy.orm.exc import StaleDataError
from werkzeug.test import TestResponse

from blueprints import message_handlers, messages
from errors import ApiError, Code
from storage import database, message_queue
from storage.models import Identity, User
from tests.blueprints.callers import Caller, code_of
from tests.harness import APP_ID, PUSH_AES_KEY, PUSH_TOKEN, WAIT_SECONDS, Simulator, counted, let_claims_be_due
from wechat.crypto import push_signature
from wechat.message_push import PUSH_NOT_CONFIGURED, MessagePush

URL = "/api/v1/wechat/messages"
EVENT = {
    "ToUserName": "gh_97417a04a28d",
    "FromUserName": "o-alice",
    "CreateTime": int(time.time()),
    "MsgType": "event",
    "Event": "debug_demo",
    "debug_str": "你好",
}
TEXT = {**EVENT, "MsgType": "text", "Content": "在吗", "MsgId": 23456}
WECHAT = MessagePush(PUSH_TOKEN, PUSH_AES_KEY, APP_ID)
Messages = list[dict[str, Any]]


@pytest.fixture
def handled(monkeypatch: pytest.MonkeyPatch) -> Messages:
    """The messages passed to the handlers of the event and of texts."""
    given: Messages = []
    handlers = {("event", "debug_demo"): [given.append], ("text", ""): [given.append]}
    monkeypatch.setattr(message_handlers, "handlers", handlers)
    monkeypatch.setattr(message_handlers, "responders", {})
    return given


def signed(*more: str, timestamp: float | None = None, token: str = PUSH_TOKEN) -> dict[str, str]:
    moment = str(int(timestamp or time.time()))
    query = {"timestamp": moment, "nonce": "n0", "signature": push_signature(token, moment, "n0")}
    return query | ({"msg_signature": push_signature(token, moment, "n0", *more)} if more else {})


def seal(message: dict[str, Any], form: Any = "json") -> tuple[dict[str, str], bytes]:
    """The query and the body with which WeChat posts a message in safe mode."""
    sealed = WECHAT.seal(message, form, time.time())
    encrypted = json.loads(sealed)["Encrypt"] if form == "json" else between(sealed, "Encrypt")
    return signed(encrypted), sealed.encode()


def between(text: str, name: str) -> str:
    return text.partition(f"<{name}>")[2].partition(f"</{name}>")[0]


def push(client: FlaskClient, message: dict[str, Any], form: Any = "json") -> TestResponse:
    query, body = seal(message, form)
    with client.post(URL, query_string=query, data=body) as answer:
        answer.get_data()
    return answer


def settled(app: Flask) -> None:
    """Handle what is pending, as the threads of a worker do."""
    queue = app.extensions["messages"]
    while queue._redis.exists(message_queue.STREAM) and queue.handle_next():
        pass


def test_the_url_is_verified(client: FlaskClient) -> None:
    answer = client.get(URL, query_string={**signed(), "echostr": "4375120948345356249"})
    assert (answer.status_code, answer.data) == (200, b"4375120948345356249")
    assert answer.content_type == "text/plain; charset=utf-8"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize(
    "query",
    [signed(token="other"), signed(timestamp=1), {**signed(), "nonce": "other"}, {**signed(), "signature": ""}, {}],
)
def test_a_wrong_signature_gets_no_echo(client: FlaskClient, query: dict[str, str]) -> None:
    answer = client.get(URL, query_string={**query, "echostr": "<script>"})
    assert code_of(answer) == (400, 464)
    assert "script" not in answer.text


@pytest.mark.parametrize("form", ["json", "xml"])
@pytest.mark.parametrize("message", [EVENT, TEXT])
def test_a_repeated_message_is_handled_once(
    app: Flask, client: FlaskClient, handled: Messages, form: str, message: dict[str, Any]
) -> None:
    for _ in range(3):
        answer = push(client, message, form)
        assert (answer.status_code, answer.data) == (200, b"success")
    settled(app)
    (fields,) = handled
    assert (fields["FromUserName"], fields["debug_str"]) == ("o-alice", "你好")


@pytest.mark.parametrize(
    ("content", "read"), [(b"a\x1db", "a\ufffdb"), (b"\xe5\xbe\xae\xe4\xbf", "微\ufffd"), (b"a&#29;", "a&#29;")]
)
def test_a_message_with_malformed_text_is_handled_and_logged(
    make_app: Callable[..., Flask], handled: Messages, log_lines: Any, content: bytes, read: str
) -> None:
    body = MessagePush(PUSH_TOKEN, "", APP_ID).seal({**TEXT, "Content": "?"}, "xml", 0).encode()
    body = body.replace(b"?", b"<![CDATA[" + content + b"]]>")
    app = make_app(WECHAT_PUSH_AES_KEY="")
    with app.test_client().post(URL, query_string=signed(), data=body) as answer:
        assert (answer.status_code, answer.data) == (200, b"success")
    settled(app)
    assert [message["Content"] for message in handled] == [read]
    reasons = [line["reason"] for line in log_lines() if line["message"] == "WeChat sent malformed text"]
    assert reasons == ["characters replaced"] * ("\ufffd" in read)


@pytest.mark.parametrize(
    ("age", "handled_times"), [(25 * 3600, 0), (86400 + 5, 0), (86400 - 60, 1), (-290, 1), (-310, 0)]
)
@pytest.mark.parametrize("safe", [True, False])
def test_a_recorded_message_is_not_accepted_a_day_later(
    make_app: Callable[..., Flask], handled: Messages, log_lines: Any, safe: bool, age: int, handled_times: int
) -> None:
    app = make_app(**({} if safe else {"WECHAT_PUSH_AES_KEY": ""}))
    now = int(time.time())
    message = {**TEXT, "CreateTime": now - age, "MsgId": age}
    body = (WECHAT if safe else MessagePush(PUSH_TOKEN, "", APP_ID)).seal(message, "json", now - age).encode()
    encrypted = [json.loads(body)["Encrypt"]] if safe else []
    # Recorded with a nonce that is the time of now: the signature is the same if both are exchanged.
    signature = push_signature(PUSH_TOKEN, str(now - age), str(now), *encrypted)
    query = {"timestamp": str(now), "nonce": str(now - age), "msg_signature" if safe else "signature": signature}
    for _ in range(2):
        with app.test_client().post(URL, query_string=query, data=body) as answer:
            assert (answer.status_code, answer.data == b"success") == ((200, True) if handled_times else (400, False))
        settled(app)
    assert len(handled) == handled_times
    reasons = [line["reason"] for line in log_lines() if line["message"] == "message push refused"]
    reason = "CreateTime is missing or old, the body encrypted without a key, or our clock wrong"
    assert reasons == ([] if handled_times else [reason] * 2)


@pytest.mark.parametrize("created", [None, "", "yesterday", True, [1], "1e9", -1, "9" * 13])
def test_a_message_without_a_valid_create_time_is_refused(
    client: FlaskClient, handled: Messages, created: object
) -> None:
    assert code_of(push(client, {**TEXT, "CreateTime": created})) == (400, 464)
    assert code_of(push(client, {name: value for name, value in TEXT.items() if name != "CreateTime"})) == (400, 464)
    assert handled == []


@pytest.mark.parametrize("form", ["json", "xml"])
def test_a_create_time_may_be_text(app: Flask, client: FlaskClient, handled: Messages, form: str) -> None:
    assert push(client, {**TEXT, "CreateTime": f" {int(time.time())} "}, form).data == b"success"
    settled(app)
    assert len(handled) == 1


def test_every_instance_recognises_a_repeat(make_app: Callable[..., Flask], handled: Messages) -> None:
    apps = [make_app() for _ in range(2)]
    for app in apps:
        assert push(app.test_client(), TEXT).status_code == 200
        settled(app)
    assert len(handled) == 1


def test_the_response_does_not_wait_for_the_handlers_and_what_is_kept_is_encrypted(
    app: Flask, client: FlaskClient, handled: Messages, redis: Redis
) -> None:
    assert push(client, EVENT).data == b"success"
    assert handled == []
    ((_, entry),) = redis.xrange(message_queue.STREAM)
    assert b"alice" not in b"".join(entry.values())
    assert redis.ttl(message_queue.STREAM) > 86400
    settled(app)
    assert [message["FromUserName"] for message in handled] == ["o-alice"]
    assert (redis.xlen(message_queue.STREAM), redis.xpending(message_queue.STREAM, "workers")["pending"]) == (0, 0)


def test_handlers_are_registered_by_type_and_by_event(app: Flask, client: FlaskClient, handled: Any) -> None:
    seen: list[str] = []
    message_handlers.on("event")(lambda message: seen.append(f"any: {message['Event']}"))
    message_handlers.on("event", "debug_demo")(lambda message: seen.append("demo"))
    for message in (EVENT, {**EVENT, "Event": "other"}, {**EVENT, "Event": ["odd"]}, TEXT, {**TEXT, "MsgType": None}):
        assert push(client, message).data == b"success"
        settled(app)
    assert sorted(seen) == ["any: ['odd']", "any: debug_demo", "any: other", "demo"]


def test_a_failing_handler_is_logged_and_counted_and_stops_no_other(
    app: Flask, client: FlaskClient, handled: Messages, log_lines: Any
) -> None:
    def fail(message: dict[str, Any]) -> None:
        raise RuntimeError("the reason")

    message_handlers.handlers["event", "debug_demo"].insert(0, fail)
    before = counted("messages_handled_total", outcome="failure")
    answer = push(client, EVENT)
    settled(app)
    (line,) = [line for line in log_lines() if line["message"] == "a handler failed"]
    assert line["traceId"] == answer.headers["X-Trace-Id"]
    assert counted("messages_handled_total", outcome="failure") == before + 1
    assert len(handled) == 1


@pytest.mark.parametrize(
    "fault",
    [
        RedisError(),
        OperationalError("SELECT 1", None, Exception()),
        StaleDataError(),
        OSError(errno.EMFILE, "no descriptor"),
        ApiError(Code.UPSTREAM_TIMEOUT),
        ApiError(Code.WECHAT_REFUSED),
    ],
)
def test_what_fails_for_a_while_is_handled_again_when_the_fault_is_over(
    app: Flask, client: FlaskClient, handled: Messages, redis: Redis, fault: Exception
) -> None:
    handler = Mock(side_effect=[fault, fault, None])
    message_handlers.handlers["event", "debug_demo"].insert(0, handler)
    push(client, EVENT)
    queue = app.extensions["messages"]
    for tries in (1, 2):
        with pytest.raises(type(fault)):
            queue.handle_next(claim=True)
        assert (handler.call_count, len(handled), redis.xlen(message_queue.STREAM)) == (tries, tries, 1)
        assert not queue.handle_next(claim=True)  # too early
        assert push(client, EVENT).data == b"success"  # a repeat, which is not kept
        let_claims_be_due(redis)
    assert queue.handle_next(claim=True)
    let_claims_be_due(redis)
    assert not queue.handle_next(claim=True)
    assert (handler.call_count, redis.xlen(message_queue.STREAM)) == (3, 0)


@pytest.mark.parametrize(("fault", "times"), [(RedisError(), 6), (ApiError(Code.UPSTREAM_TIMEOUT), 3)])
def test_an_outage_may_last_longer_than_a_message_that_fails(
    app: Flask,
    client: FlaskClient,
    handled: Messages,
    redis: Redis,
    fault: Exception,
    times: int,
) -> None:
    handler = message_handlers.handlers["event", "debug_demo"][0] = Mock(side_effect=fault)
    push(client, EVENT)
    queue = app.extensions["messages"]
    for _ in range(times):
        with pytest.raises(type(fault)):
            queue.handle_next(claim=True)
        let_claims_be_due(redis)
    handler.side_effect = None
    assert queue.handle_next(claim=True)
    assert (handler.call_count, redis.xlen(message_queue.STREAM)) == (times + (times > message_queue.TRIES), 0)


@pytest.mark.parametrize("fault", [KeyError("OpenID"), OSError(errno.ENOENT, "no file"), ApiError(Code.NOT_FOUND)])
def test_what_will_fail_again_is_handled_once(
    app: Flask, client: FlaskClient, handled: Messages, redis: Redis, fault: Exception
) -> None:
    message_handlers.handlers["event", "debug_demo"] = [Mock(side_effect=fault)]
    push(client, EVENT)
    assert app.extensions["messages"].handle_next()
    assert redis.xlen(message_queue.STREAM) == 0


def test_handlers_share_a_time_that_is_shorter_than_that_of_a_claim(
    app: Flask, client: FlaskClient, handled: Messages, log_lines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (messages.HANDLERS_SECONDS + 30) * 1000 < message_queue.CLAIM_MILLISECONDS  # and gunicorn's timeout
    monkeypatch.setattr(messages, "HANDLERS_SECONDS", 0.2)
    message_handlers.handlers["event", "debug_demo"].insert(0, lambda message: gevent.sleep(WAIT_SECONDS))
    push(client, EVENT)
    settled(app)
    (line,) = [line for line in log_lines() if line["message"] == "a handler failed"]
    assert line["exceptionType"] == "gevent.timeout.Timeout"
    assert "0.1 seconds" in line["exceptionMessage"]
    assert len(handled) == 1


def test_a_full_backlog_is_503_so_that_wechat_sends_again(
    app: Flask, client: FlaskClient, handled: Messages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(message_queue, "BACKLOG", 1)
    before = counted("messages_handled_total", outcome="rejected")
    assert push(client, TEXT).status_code == 200
    answer = push(client, EVENT)
    assert code_of(answer) == (503, 503)
    assert answer.headers["Retry-After"]
    assert counted("messages_handled_total", outcome="rejected") == before + 1
    assert push(client, TEXT).status_code == 200  # a repeat takes no room
    settled(app)
    assert push(client, EVENT).status_code == 200
    settled(app)
    assert [message["MsgType"] for message in handled] == ["text", "event"]


@pytest.mark.parametrize("unit", [b"9e15,", b'"%s",' % (b"\x01" * 1000), b'"%s",' % (b"\xff" * 1000)])
def test_a_full_backlog_takes_no_more_of_redis_than_is_said(
    make_app: Callable[..., Flask], handled: Messages, redis: Redis, unit: bytes
) -> None:
    client = make_app(WECHAT_PUSH_AES_KEY="").test_client()
    messages_ = 40
    redis.ping()
    before = redis.info("memory")["used_memory"]
    for number in range(messages_):
        head = json.dumps({**TEXT, "MsgId": number})[:-1].encode() + b', "more": ['
        body = head + unit * ((messages.MAXIMUM_BYTES - len(head) - 3) // len(unit)) + b"1]}"
        assert client.post(URL, query_string=signed(), data=body).data == b"success"
    taken = redis.info("memory")["used_memory"] - before
    assert redis.xlen(message_queue.STREAM) == messages_
    assert taken / messages_ * message_queue.BACKLOG < 900_000_000


def test_a_message_is_remembered_for_longer_than_it_is_accepted(
    app: Flask, client: FlaskClient, handled: Messages, redis: Redis
) -> None:
    push(client, EVENT)
    (mark,) = redis.scan_iter("message:*")
    assert redis.ttl(mark) > 2 * 86400 - 60


def test_without_redis_a_message_is_503_and_handled_when_wechat_sends_it_again(
    app: Flask, client: FlaskClient, handled: Messages, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as away:
        away.setattr(message_queue, "execute_replicated", Mock(side_effect=RedisError))
        assert code_of(push(client, EVENT)) == (503, 503)
    assert push(client, EVENT).status_code == 200
    settled(app)
    assert len(handled) == 1


def test_a_message_whose_confirmation_was_lost_is_handled_once(
    app: Flask, client: FlaskClient, handled: Messages, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose_the_response(pipeline: Any) -> None:
        pipeline.execute()
        raise RedisError

    with monkeypatch.context() as broken:
        broken.setattr(message_queue, "execute_replicated", lose_the_response)
        assert code_of(push(client, EVENT)) == (503, 503)
    assert push(client, EVENT).data == b"success"
    settled(app)
    assert len(handled) == 1


def test_a_message_without_handlers_is_not_kept(client: FlaskClient, handled: Messages, redis: Redis) -> None:
    assert push(client, {**EVENT, "Event": "unheard_of"}).data == b"success"
    assert redis.dbsize() == 0


@pytest.mark.parametrize("form", ["json", "xml"])
def test_a_responder_responds_in_the_form_and_mode_of_the_account(
    client: FlaskClient, handled: Messages, form: Any
) -> None:
    reply_with = {"MsgType": "transfer_customer_service", "ToUserName": "你好"}
    message_handlers.on("text", reply=True)(lambda message: reply_with)
    for _ in range(2):  # a repeat is answered again
        answer = push(client, TEXT, form)
        assert answer.content_type.startswith({"json": "application/json", "xml": "text/xml"}[form])
        names = ("TimeStamp", "Nonce", "MsgSignature")
        values = [answer.get_json()[name] if form == "json" else between(answer.text, name) for name in names]
        query = dict(zip(("timestamp", "nonce", "msg_signature"), map(str, values), strict=True))
        reply = WECHAT.open(query, answer.data, time.time())
        assert reply.fields == reply_with


def test_the_responder_of_one_event_precedes_that_of_all_events(client: FlaskClient, handled: Any) -> None:
    message_handlers.on("event", reply=True)(lambda message: {"of": "all"})
    message_handlers.on("event", "debug_demo", reply=True)(lambda message: {"of": "one"})
    for event, of in ((EVENT, "one"), ({**EVENT, "Event": "other"}, "all")):
        reply = push(client, event).get_json()
        query = {"timestamp": str(reply["TimeStamp"]), "nonce": reply["Nonce"], "msg_signature": reply["MsgSignature"]}
        assert WECHAT.open(query, json.dumps(reply).encode(), time.time()).fields == {"of": of}


def test_a_failing_responder_is_logged_and_the_handlers_run(
    app: Flask, client: FlaskClient, handled: Messages, log_lines: Any
) -> None:
    message_handlers.on("text", reply=True)(lambda message: {"Content": message["no such field"]})
    answer = push(client, TEXT)
    assert (answer.status_code, answer.data) == (200, b"success")
    settled(app)
    assert len(handled) == 1
    (line,) = [line for line in log_lines() if line["message"] == "a responder failed"]
    assert "no such field" in line["exceptionMessage"]


def test_received_messages_and_rejections_are_logged(client: FlaskClient, handled: Messages, log_lines: Any) -> None:
    for _ in range(2):
        push(client, EVENT)
    push(client, {**EVENT, "Event": "unheard_of"})
    client.post(URL, query_string=signed(token="other"), json=EVENT)
    client.post(URL, query_string={**signed(), "msg_signature": "x"}, json=EVENT)
    query, body = seal(EVENT)
    client.post(URL, query_string={**query, "msg_signature": "x"}, data=body)
    received = [line for line in log_lines() if line["message"] == "message received"]
    assert [(line["event"], line["repeat"], line["handlers"]) for line in received] == [
        ("debug_demo", False, 1),
        ("debug_demo", True, 1),
        ("unheard_of", False, 0),
    ]
    refused = [line["reason"] for line in log_lines() if line["message"] == "message push refused"]
    assert refused == ["plain, but an EncodingAESKey is set"] * 2 + ["wrong token, or altered"]
    codes = [line["code"] for line in log_lines() if line["message"] == "request"]
    assert codes == [200, 200, 200, 464, 464, 464]


def test_a_plain_body_is_rejected_whatever_the_query_says_of_encryption(client: FlaskClient, handled: Messages) -> None:
    for more in ({}, {"encrypt_type": "raw"}, {"encrypt_type": "aes"}, {"msg_signature": "x"}):
        answer = client.post(URL, query_string={**signed(), **more}, json=EVENT)
        assert code_of(answer) in ((400, 400), (400, 464))
    assert handled == []


@pytest.mark.parametrize("form", ["json", "xml"])
def test_a_plain_account_takes_plain_bodies_and_responds_plainly(
    make_app: Callable[..., Flask], handled: Messages, form: Any
) -> None:
    app = make_app(WECHAT_PUSH_AES_KEY="")
    message_handlers.on("text", reply=True)(lambda message: {"Content": message["Content"]})
    body = MessagePush(PUSH_TOKEN, "", APP_ID).seal(TEXT, form, 0)
    with app.test_client().post(URL, query_string={**signed(), "encrypt_type": "aes"}, data=body.encode()) as answer:
        assert answer.status_code == 200
        assert "在吗" in answer.text
    settled(app)
    assert len(handled) == 1
    forged = app.test_client().post(URL, query_string=signed(token="other"), data=body.encode())
    assert forged.get_json()["code"] == 464


def test_without_a_token_the_route_is_404(make_app: Callable[..., Flask], handled: Messages) -> None:
    client = make_app(WECHAT_PUSH_TOKEN="", WECHAT_PUSH_AES_KEY="").test_client()
    for answer in (
        client.get(URL, query_string={**signed(token=""), "echostr": "x"}),
        client.post(URL, query_string=signed(token=""), json=EVENT),
    ):
        assert code_of(answer) == (404, 404)
        assert answer.get_json()["message"] == PUSH_NOT_CONFIGURED.chinese
    assert handled == []


@pytest.mark.parametrize("configured", [True, False])
def test_the_probe_of_wechat_cloud_run_gets_success_and_changes_nothing(
    make_app: Callable[..., Flask], redis: Redis, configured: bool
) -> None:
    client = make_app(**({} if configured else {"WECHAT_PUSH_TOKEN": "", "WECHAT_PUSH_AES_KEY": ""})).test_client()
    answer = client.post(URL, json={"action": "CheckContainerPath"})
    assert (answer.status_code, answer.data) == (200, b"success")
    assert client.post(URL, json={"action": "CheckContainerPath", "MsgType": "event"}).status_code != 200
    assert redis.dbsize() == 0


def test_a_malformed_body_is_400_and_a_long_one_413(client: FlaskClient) -> None:
    for body in (b"", b"{", b"[]", b"<xml>", b"<xml/>", b"\xff", b"[" * 90, b"<" * 64 * 1024):
        assert code_of(client.post(URL, query_string=signed("x"), data=body)) in ((400, 400), (400, 464)), body[:9]
    assert client.post(URL, query_string=signed("x"), data=b"<" * (64 * 1024 + 1)).status_code == 413


def make_user(app: Flask, simulator: Simulator) -> Caller:
    """A user with data of every kind."""
    user = Caller(app, simulator, nickname="阿上", avatar_url="https://example.com/a.png", phone="13812345678")
    user.store(real_name="张三")
    with app.app_context():
        database.session.get_one(Identity, (APP_ID, user.openid)).authorization = "granted"
        database.session.commit()
    return user


def data_left(user: Caller) -> set[str]:
    with user.app.app_context():
        row = database.session.get_one(User, user.id)
        authorization = database.session.get_one(Identity, (APP_ID, user.openid)).authorization
        values = {"nickname": row.nickname, "avatar": row.avatar_url, "phone": row.phone, "tokens": authorization}
        values["real_name"] = row.real_name
    return {name for name, value in values.items() if value}


ALL = {"nickname", "avatar", "phone", "tokens", "real_name"}


@pytest.mark.parametrize(
    ("details", "left"),
    [
        ({"RevokeInfo": "6"}, ALL - {"nickname", "avatar"}),
        ({"RevokeInfo": "8"}, ALL - {"phone"}),
        ({"RevokeInfo": 8}, ALL - {"phone"}),
        ({"RevokeInfo": "19"}, ALL - {"nickname"}),
        ({"RevokeInfo": "20"}, ALL - {"avatar"}),
        ({"RevokeInfo": "5"}, ALL),  # the microphone
        ({}, ALL),
        ({"RevokeInfo": "8", "PluginID": "wx-plugin"}, ALL),
        ({"RevokeInfo": "8", "OpenID": "o-nobody"}, ALL),
        ({"RevokeInfo": "8", "OpenID": None}, ALL),
    ],
)
def test_a_revocation_erases_that_data_alone(
    app: Flask, client: FlaskClient, simulator: Simulator, log_lines: Any, details: dict[str, Any], left: set[str]
) -> None:
    user = make_user(app, simulator)
    push(client, {**EVENT, "Event": "user_authorization_revoke", "OpenID": user.openid, **details})
    settled(app)
    assert data_left(user) == left
    assert "a handler failed" not in {line["message"] for line in log_lines()}


def test_a_revocation_that_loses_a_race_is_retried(app: Flask, client: FlaskClient, simulator: Simulator) -> None:
    user = make_user(app, simulator)
    lost = [StaleDataError]

    def lose_once(session: Session) -> None:
        if lost and session.dirty:
            raise lost.pop()

    sqlalchemy_event.listen(Session, "before_commit", lose_once)
    try:
        push(client, {**EVENT, "Event": "user_authorization_revoke", "OpenID": user.openid, "RevokeInfo": "8"})
        settled(app)
    finally:
        sqlalchemy_event.remove(Session, "before_commit", lose_once)
    assert lost == []
    assert data_left(user) == ALL - {"phone"}


def test_a_cancellation_deletes_the_user_and_ends_the_sessions(
    app: Flask, client: FlaskClient, simulator: Simulator
) -> None:
    users = [make_user(app, simulator) for _ in range(2)]
    cancellation = {**EVENT, "Event": "user_authorization_cancellation", "OpenID": users[0].openid}
    for number in range(2):  # after the death of its process it is handled again
        push(client, {**cancellation, "debug_str": str(number)})
        settled(app)
    with app.app_context():
        assert [database.session.get(User, user.id) is None for user in users] == [True, False]
    assert data_left(users[1]) == ALL
    assert [user.get("/users/me").status_code for user in users] == [401, 200]


@pytest.mark.only_on("sqlite")
def test_a_cancellation_while_another_one_writes_to_sqlite_is_done_when_that_has_ended(
    app: Flask, client: FlaskClient, simulator: Simulator, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "STATEMENT_SECONDS", 0.3)
    user, queue = make_user(app, simulator), app.extensions["messages"]
    before = counted("messages_handled_total", outcome="success")
    with closing(sqlite3.connect(str(make_url(app.config["DATABASE_URL"]).database), isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        cancellation = {**EVENT, "Event": "user_authorization_cancellation", "OpenID": user.openid}
        assert push(client, cancellation).data == b"success"
        with pytest.raises(OperationalError):
            queue.handle_next()
        other.execute("COMMIT")
    assert data_left(user) == ALL
    let_claims_be_due(redis)
    assert queue.handle_next(claim=True)
    with app.app_context():
        assert database.session.get(User, user.id) is None
    assert counted("messages_handled_total", outcome="success") == before + 1
    assert redis.xlen(message_queue.STREAM) == 0
