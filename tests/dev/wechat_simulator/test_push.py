"""The message push, at a server that takes what WeChat sends."""

import json
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from flask.testing import FlaskClient
from werkzeug import Request, Response
from werkzeug.serving import make_server

from dev.wechat_simulator import PushSettings, create_simulator, crypto, push
from tests.harness import APP_ID, PUSH_AES_KEY, PUSH_TOKEN, Simulator

Control = Callable[..., Any]
EVENT = {"MsgType": "event", "Event": "debug_demo", "FromUserName": "o-alice", "debug_str": "你好 ]]> & <b>"}


class Receiver:
    """A server that keeps what it gets, and answers what it is told in turn, then "success"."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.answers: list[Callable[[Request], Response]] = []
        self.server = make_server("127.0.0.1", 0, self.take, threaded=True)
        self.url = f"http://127.0.0.1:{self.server.server_port}/push"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    @Request.application
    def take(self, request: Request) -> Response:
        request.get_data()
        self.requests.append(request)
        return self.answers.pop(0)(request) if self.answers else Response("success")

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


def status(code: int) -> Callable[[Request], Response]:
    return lambda _: Response("", code)


def opened(request: Request, encrypted: str) -> tuple[bytes, str]:
    """Verify a push in safe mode, and decrypt it."""
    query = request.args
    expected = crypto.push_signature(PUSH_TOKEN, query["timestamp"], query["nonce"], encrypted)
    assert (query["encrypt_type"], query["msg_signature"]) == ("aes", expected)
    assert query["signature"] == crypto.push_signature(PUSH_TOKEN, query["timestamp"], query["nonce"])
    return crypto.decrypt_message(PUSH_AES_KEY, encrypted)


def test_a_push_is_encrypted_json_where_a_key_is_set(control: Control, receiver: Receiver) -> None:
    (answer,) = control("push", message=EVENT, url=receiver.url)["answers"]
    assert (answer["status"], answer["body"], answer["reply"]) == (200, "success", None)
    assert 0 <= answer["seconds"] < 5
    (request,) = receiver.requests
    assert (request.method, request.content_type) == ("POST", "application/json")
    assert request.args["openid"] == "o-alice"
    body = json.loads(request.data)
    assert body.keys() == {"ToUserName", "Encrypt"}
    message, app_id = opened(request, body["Encrypt"])
    assert app_id == APP_ID
    pushed = json.loads(message)
    assert pushed.pop("ToUserName") == body["ToUserName"]
    assert pushed.pop("CreateTime") == pytest.approx(time.time(), abs=5)
    assert pushed == EVENT


def test_a_push_is_encrypted_xml_on_demand(control: Control, receiver: Receiver) -> None:
    listed = {"List": [{"TemplateId": "t-1", "Count": 1}, {"TemplateId": "t-2", "Count": 2}]}
    control("push", message={**EVENT, "Popup": listed}, url=receiver.url, format="xml")
    (request,) = receiver.requests
    assert request.content_type.startswith("text/xml")
    outer = ET.fromstring(request.data)
    message, app_id = opened(request, outer.findtext("Encrypt") or "")
    assert app_id == APP_ID
    inner = ET.fromstring(message)
    assert inner.tag == "xml"
    assert {name: inner.findtext(name) for name in EVENT} == EVENT
    assert [part.findtext("TemplateId") for part in inner.findall("Popup/List")] == ["t-1", "t-2"]
    assert b"<MsgType><![CDATA[event]]></MsgType>" in message
    assert b"<Count>2</Count>" in message


@pytest.mark.parametrize("wire_format", ["json", "xml"])
def test_a_plain_push_is_signed_alone(control: Control, receiver: Receiver, wire_format: str) -> None:
    control("push", message=EVENT, url=receiver.url, format=wire_format, mode="plain")
    (request,) = receiver.requests
    query = request.args
    assert query.keys() == {"signature", "timestamp", "nonce", "openid"}
    assert query["signature"] == crypto.push_signature(PUSH_TOKEN, query["timestamp"], query["nonce"])
    if wire_format == "json":
        said = json.loads(request.data)["debug_str"]
        assert "你好".encode() in request.data
    else:
        said = ET.fromstring(request.data).findtext("debug_str")
    assert said == EVENT["debug_str"]


def test_without_a_key_pushes_are_plain_and_go_to_the_usual_place(receiver: Receiver) -> None:
    wechat = create_simulator(APP_ID, "secret", push=PushSettings(PUSH_TOKEN, url=receiver.url)).test_client()
    assert wechat.post("/simulator/push", json={"message": EVENT}).get_json()["answers"][0]["status"] == 200
    assert json.loads(receiver.requests[0].data)["Event"] == "debug_demo"
    assert wechat.post("/simulator/push/verify").get_json()["status"] == 200
    assert wechat.post("/simulator/push", json={"message": EVENT, "mode": "safe"}).status_code == 400


def test_what_a_message_lacks_is_filled_in_and_what_it_has_is_kept(control: Control, receiver: Receiver) -> None:
    control("clock", advance=3600)
    text = {"MsgType": "text", "Content": "你好"}
    control("push", message=text, url=receiver.url, mode="plain")
    given = {"ToUserName": "gh_1", "FromUserName": "o-bob", "CreateTime": 1, "MsgId": 7}
    control("push", message={**text, **given}, url=receiver.url, mode="plain")
    filled, kept = (json.loads(request.data) for request in receiver.requests)
    assert filled.keys() == kept.keys()
    assert filled["CreateTime"] == pytest.approx(time.time() + 3600, abs=5)
    assert isinstance(filled["MsgId"], int)
    assert kept == {**text, **given}


def test_a_push_can_be_forged(control: Control, receiver: Receiver) -> None:
    wanted = {"timestamp": 1714112445, "nonce": "415670741", "signature": "0" * 40, "app_id": "wx-other"}
    for mode in ("safe", "plain"):
        control("push", message=EVENT, url=receiver.url, mode=mode, **wanted)
    safe, plain = receiver.requests
    assert (safe.args["timestamp"], safe.args["nonce"]) == ("1714112445", "415670741")
    assert safe.args["msg_signature"] == plain.args["signature"] == "0" * 40
    assert safe.args["signature"] == crypto.push_signature(PUSH_TOKEN, "1714112445", "415670741")
    assert crypto.decrypt_message(PUSH_AES_KEY, json.loads(safe.data)["Encrypt"])[1] == "wx-other"


def test_a_push_is_repeated_until_the_answer_is_http_200(control: Control, receiver: Receiver) -> None:
    receiver.answers = [status(500), status(302)]
    answers = control("push", message={"MsgType": "text"}, url=receiver.url)["answers"]
    assert [answer["status"] for answer in answers] == [500, 302, 200]
    pushed = [opened(request, json.loads(request.data)["Encrypt"])[0] for request in receiver.requests]
    assert len(set(pushed)) == 1
    assert len({request.args["nonce"] for request in receiver.requests}) == 3


def test_a_push_is_given_up_after_three_times_or_as_many_as_wanted(control: Control, receiver: Receiver) -> None:
    receiver.answers = [status(500)] * 4
    assert len(control("push", message=EVENT, url=receiver.url)["answers"]) == 3
    assert len(control("push", message=EVENT, url=receiver.url, attempts=1)["answers"]) == 1


def test_no_answer_in_time_is_none(control: Control, receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    assert push.ANSWER_SECONDS == 5
    monkeypatch.setattr(push, "ANSWER_SECONDS", 0.2)

    def dawdle(_: Request) -> Response:
        time.sleep(0.4)
        return Response("success")

    receiver.answers = [dawdle]
    first, second = control("push", message=EVENT, url=receiver.url)["answers"]
    assert (first["status"], first["body"], first["reply"]) == (None, None, None)
    assert first["seconds"] >= 0.2
    assert second["status"] == 200


def encrypted_reply(wire_format: str, app_id: str = APP_ID, token: str = PUSH_TOKEN) -> Response:
    message = {"json": '{"demo_resp": "好"}', "xml": "<xml><demo_resp><![CDATA[好]]></demo_resp></xml>"}[wire_format]
    encrypted = crypto.encrypt_message(PUSH_AES_KEY, message.encode(), app_id)
    signature = crypto.push_signature(token, "1713424427", "415670741", encrypted)
    if wire_format == "xml":
        inner = f"<Encrypt><![CDATA[{encrypted}]]></Encrypt><MsgSignature><![CDATA[{signature}]]></MsgSignature>"
        return Response(f"<xml>{inner}<TimeStamp>1713424427</TimeStamp><Nonce>415670741</Nonce></xml>")
    reply = {"Encrypt": encrypted, "MsgSignature": signature, "TimeStamp": 1713424427, "Nonce": "415670741"}
    return Response(json.dumps(reply))


@pytest.mark.parametrize("wire_format", ["json", "xml"])
def test_an_encrypted_reply_is_read(control: Control, receiver: Receiver, wire_format: str) -> None:
    receiver.answers = [lambda _: encrypted_reply(wire_format)]
    (answer,) = control("push", message=EVENT, url=receiver.url, format=wire_format)["answers"]
    assert answer["reply"] == {"demo_resp": "好"}


@pytest.mark.parametrize(
    "reply",
    [
        encrypted_reply("json", app_id="wx-other"),
        encrypted_reply("json", token="other"),
        Response('{"Encrypt": "AAAA", "MsgSignature": "0", "TimeStamp": 1, "Nonce": "1"}'),
        Response('{"Encrypt": 1, "MsgSignature": "0", "TimeStamp": 1, "Nonce": "1"}'),
        Response('{"demo_resp": "plain"}'),
        Response("[]"),
        Response("<xml>"),
        Response(b"\xff"),
        Response(""),
    ],
)
def test_what_is_no_good_reply_is_none(control: Control, receiver: Receiver, reply: Response) -> None:
    receiver.answers = [lambda _: reply]
    assert control("push", message=EVENT, url=receiver.url)["answers"][0]["reply"] is None


def test_a_url_is_verified_by_its_echo(control: Control, receiver: Receiver) -> None:
    receiver.answers = [lambda request: Response(request.args["echostr"]), status(403)]
    answer = control("push/verify", url=receiver.url)
    assert (answer["verified"], answer["status"]) == (True, 200)
    query = receiver.requests[0].args
    assert answer["body"] == query["echostr"]
    assert query["signature"] == crypto.push_signature(PUSH_TOKEN, query["timestamp"], query["nonce"])
    assert control("push/verify", url=receiver.url) == {"verified": False, "status": 403, "body": ""}
    assert control("push/verify", url=receiver.url, signature="0")["verified"] is False
    assert receiver.requests[-1].args["signature"] == "0"


@pytest.mark.parametrize("wanted", [{}, {"url": "http://x", "format": "yaml"}, {"url": "http://x", "mode": "odd"}])
def test_a_push_that_could_never_happen_is_refused(wechat: FlaskClient, wanted: dict[str, str]) -> None:
    assert wechat.post("/simulator/push", json={"message": EVENT, **wanted}).status_code == 400


def test_the_harness_steers_all_of_it(simulator: Simulator, receiver: Receiver) -> None:
    (answer,) = simulator.push(EVENT, url=receiver.url)
    assert answer["status"] == 200
    assert opened(receiver.requests[0], json.loads(receiver.requests[0].data)["Encrypt"])[1] == APP_ID
    assert simulator.verify_push(url=receiver.url) == {"verified": False, "status": 200, "body": "success"}
