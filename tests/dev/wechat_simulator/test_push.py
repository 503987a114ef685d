"""The message push where the service's tests do not exercise it."""

import json
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from werkzeug import Request, Response

from dev.wechat_simulator import PushSettings, create_simulator, crypto, push
from tests.harness import APP_ID, PUSH_AES_KEY, PUSH_TOKEN
from tests.wechat.harness import server

Control = Callable[..., Any]
EVENT = {"MsgType": "event", "Event": "debug_demo", "FromUserName": "o-alice", "debug_str": "你好 ]]> & <b>"}


class Receiver:
    """Keeps the requests it gets, and sends the given responses in turn, then "success"."""

    def __init__(self) -> None:
        self.url = ""
        self.requests: list[Request] = []
        self.responses: list[Callable[[Request], Response]] = []

    def receive(self, request: Request) -> Response:
        request.get_data()
        self.requests.append(request)
        return self.responses.pop(0)(request) if self.responses else Response("success")


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    with server(receiver.receive) as receiver.url:
        yield receiver


def status(code: int) -> Callable[[Request], Response]:
    return lambda _: Response("", code)


def test_a_push_is_encrypted_xml_on_demand(control: Control, receiver: Receiver) -> None:
    listed = {"List": [{"TemplateId": "t-1", "Count": 1}, {"TemplateId": "t-2", "Count": 2}]}
    control("push", message={**EVENT, "Popup": listed}, url=receiver.url, format="xml")
    (request,) = receiver.requests
    assert request.content_type.startswith("text/xml")
    assert (request.args["encrypt_type"], request.args["openid"]) == ("aes", "o-alice")
    message, _ = crypto.decrypt_message(PUSH_AES_KEY, ET.fromstring(request.data).findtext("Encrypt") or "")
    inner = ET.fromstring(message)
    assert {name: inner.findtext(name) for name in EVENT} == EVENT
    assert [part.findtext("TemplateId") for part in inner.findall("Popup/List")] == ["t-1", "t-2"]
    assert b"<MsgType><![CDATA[event]]></MsgType>" in message
    assert b"<Count>2</Count>" in message


def test_without_a_key_pushes_are_plain_and_go_to_the_default_address(receiver: Receiver) -> None:
    wechat = create_simulator(APP_ID, "secret", push=PushSettings(PUSH_TOKEN, url=receiver.url)).test_client()
    assert wechat.post("/simulator/push", json={"message": EVENT}).get_json()["answers"][0]["status"] == 200
    assert json.loads(receiver.requests[0].data)["debug_str"] == EVENT["debug_str"]
    assert receiver.requests[0].args.keys() == {"signature", "timestamp", "nonce", "openid"}
    assert wechat.post("/simulator/push", json={"message": EVENT, "mode": "safe"}).status_code == 400
    verified = wechat.post("/simulator/push/verify").get_json()
    assert (verified["verified"], verified["status"]) == (False, 200)  # not the echo


def test_missing_fields_of_a_message_are_filled_in(control: Control, receiver: Receiver) -> None:
    control("clock", advance=3600)
    text = {"MsgType": "text", "Content": "你好"}
    given = {"ToUserName": "gh_1", "FromUserName": "o-bob", "CreateTime": 1, "MsgId": 7}
    for message in (text, {**text, **given}):
        control("push", message=message, url=receiver.url, mode="plain")
    filled, kept = (json.loads(request.data) for request in receiver.requests)
    assert filled.keys() == kept.keys()
    assert filled["CreateTime"] == pytest.approx(time.time() + 3600, abs=60)
    assert kept == {**text, **given}


def test_a_push_is_repeated_up_to_three_times_until_http_200(control: Control, receiver: Receiver) -> None:
    receiver.responses = [status(500), status(302)]
    attempts = control("push", message={"MsgType": "text"}, url=receiver.url)["answers"]
    assert [attempt["status"] for attempt in attempts] == [500, 302, 200]
    encrypted = [json.loads(request.data)["Encrypt"] for request in receiver.requests]
    assert len({crypto.decrypt_message(PUSH_AES_KEY, text) for text in encrypted}) == 1
    assert len({request.args["nonce"] for request in receiver.requests}) == 3
    receiver.responses = [status(500)] * 4
    assert len(control("push", message=EVENT, url=receiver.url)["answers"]) == 3
    assert len(control("push", message=EVENT, url=receiver.url, attempts=1)["answers"]) == 1


def test_a_late_response_counts_as_none(control: Control, receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    assert push.ANSWER_SECONDS == 5
    monkeypatch.setattr(push, "ANSWER_SECONDS", 0.2)
    late = threading.Event()

    def respond_late(_: Request) -> Response:
        late.wait(5)
        return Response("success")

    receiver.responses = [respond_late]
    first = control("push", message=EVENT, url=receiver.url, attempts=1)["answers"][0]
    late.set()
    assert (first["status"], first["body"], first["reply"]) == (None, None, None)
    assert first["seconds"] >= 0.2


def encrypted_reply(app_id: str = APP_ID, token: str = PUSH_TOKEN) -> Response:
    encrypted = crypto.encrypt_message(PUSH_AES_KEY, '{"demo_resp": "好"}'.encode(), app_id)
    signature = crypto.push_signature(token, "1713424427", "415670741", encrypted)
    reply = {"Encrypt": encrypted, "MsgSignature": signature, "TimeStamp": 1713424427, "Nonce": "415670741"}
    return Response(json.dumps(reply))


@pytest.mark.parametrize(
    ("response", "reply"),
    [
        (encrypted_reply(), {"demo_resp": "好"}),
        (encrypted_reply(app_id="wx-other"), None),
        (encrypted_reply(token="other"), None),
        (Response('{"Encrypt": 1, "MsgSignature": "0", "TimeStamp": 1, "Nonce": "1"}'), None),
        *[(Response(body), None) for body in (b'{"demo_resp": "plain"}', b"[]", b"<xml>", b"\xff")],
    ],
)
def test_only_a_valid_encrypted_reply_is_read(
    control: Control, receiver: Receiver, response: Response, reply: dict[str, str] | None
) -> None:
    receiver.responses = [lambda _: response]
    assert control("push", message=EVENT, url=receiver.url)["answers"][0]["reply"] == reply
