import base64
import json
import random
import secrets
import string
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree
from xml.sax.saxutils import escape

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wechatpy.crypto import PrpCrypto, WeChatCrypto

from errors import ApiError, Code
from tests.wechat.harness import (
    ANY_TEXT,
    JSON,
    JSON_OBJECTS,
    VECTORS,
    any_text,
    encrypt_cbc,
    flipped,
    outcome,
    pad,
    refusal,
)
from wechat import lenient
from wechat.crypto import decode_aes_key, encrypt_message, push_signature
from wechat.message_push import WINDOW_SECONDS, Form, MessagePush, PushMessage

SAFE, REPLY = VECTORS["push.safe_mode_json"], VECTORS["push.safe_mode_json_reply"]
PLAIN, URL = VECTORS["push.plain_mode"], VECTORS["push.url_verify"]
TOKEN, ENCODING_AES_KEY, APP_ID = SAFE["token"], SAFE["encoding_aes_key"], SAFE["appid"]
AES_KEY = decode_aes_key(ENCODING_AES_KEY)
NOW = 1_714_112_445

FORMS: list[Form] = ["json", "xml"]
NAMES = st.text(string.ascii_letters, min_size=1, max_size=5)
XML_TEXT = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\x7f\ufffe\uffff", min_codepoint=32)
    | st.sampled_from("\t\n\r<>&]]>'\"")
)


PLAIN_MODE = MessagePush(TOKEN, "", APP_ID)
SAFE_MODE = MessagePush(TOKEN, ENCODING_AES_KEY, APP_ID)


def sign(*encrypted: str, timestamp: object = NOW, nonce: str = "n", token: str = TOKEN) -> dict[str, str]:
    """The query of a request signed by WeChat, with msg_signature for an encrypted body."""
    timestamp = str(timestamp)
    query = {"timestamp": timestamp, "nonce": nonce, "signature": push_signature(token, timestamp, nonce)}
    for text in encrypted:
        query |= {"encrypt_type": "aes", "msg_signature": push_signature(token, timestamp, nonce, text)}
    return query


def encrypt(text: str, app_id: str = APP_ID) -> str:
    return encrypt_message(text, AES_KEY, app_id, bytes(16))


def encrypt_bytes(content: bytes) -> str:
    """Encrypt what need not be text."""
    plaintext = bytes(16) + len(content).to_bytes(4, "big") + content + APP_ID.encode()
    return base64.b64encode(encrypt_cbc(pad(plaintext, 32), AES_KEY, AES_KEY[:16])).decode()


def enclose(encrypted: object, **others: object) -> bytes:
    return json.dumps({"ToUserName": "gh_97417a04a28d", "Encrypt": encrypted, **others}).encode()


def open_encrypted(push: MessagePush, text: str, app_id: str = APP_ID, **signed: Any) -> PushMessage:
    """Open any text under a valid signature."""
    encrypted = encrypt(text, app_id)
    return push.open(sign(encrypted, **signed), enclose(encrypted), NOW)


def open_plain(push: MessagePush, body: bytes) -> PushMessage:
    return push.open(sign(), body, NOW)


def errors_of(call: Callable[..., Any], *args: Any) -> dict[str, Any] | None:
    with pytest.raises(ApiError) as caught:
        call(*args, NOW)
    assert caught.value.api_code is Code.INVALID_INPUT
    return caught.value.errors


def vector_query(vector: dict[str, Any]) -> dict[str, str]:
    names = ("signature", "msg_signature", "timestamp", "nonce", "echostr")
    return {name: vector[name] for name in names if name in vector}


def verify_url(query: dict[str, str], now: float, push: MessagePush = PLAIN_MODE) -> None:
    push.verify(query, "signature", now=now)


# Known answers


@pytest.mark.parametrize(
    ("call", "vector", "expected"),
    [
        (lambda query: verify_url(query, int(URL["timestamp"])), URL, None),
        (lambda query: verify_url(query, int(URL["timestamp"]), SAFE_MODE), URL, None),
        (
            lambda query: PLAIN_MODE.open(query, PLAIN["body"].encode(), int(PLAIN["timestamp"])),
            PLAIN,
            (json.loads(PLAIN["body"]), "json"),
        ),
        (
            lambda query: SAFE_MODE.open(query, enclose(SAFE["encrypt"]), NOW),
            SAFE,
            (json.loads(SAFE["plaintext"]), "json"),
        ),
    ],
)
def test_the_published_requests_are_accepted_but_not_with_a_flipped_bit(
    call: Callable[[dict[str, str]], Any], vector: dict[str, Any], expected: object
) -> None:
    query = vector_query(vector)
    assert call(query) == expected
    for name in query.keys() - {"echostr"}:
        for altered in flipped(query[name].encode(), (0x01, 0x02, 0x04)):  # that leave ASCII
            assert refusal(call, query | {name: altered.decode()}) is Code.SIGNATURE_MISMATCH


def test_the_published_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "token_bytes", {16: REPLY["random"].encode()}.__getitem__)
    monkeypatch.setattr(secrets, "token_hex", lambda count: REPLY["nonce"])
    sealed = json.loads(SAFE_MODE.seal(json.loads(REPLY["plaintext"]), "json", float(REPLY["timestamp"]) + 0.9))
    published = [REPLY[name] for name in ("encrypt", "msg_signature", "timestamp", "nonce")]
    assert list(sealed) == ["Encrypt", "MsgSignature", "TimeStamp", "Nonce"]
    assert [*map(str, sealed.values())] == published
    assert type(sealed["TimeStamp"]) is int


# Altered and forged


def test_another_ciphertext_token_or_aes_key_is_refused() -> None:
    for ciphertext in flipped(base64.b64decode(SAFE["encrypt"])):  # also where CBC hides it
        body = enclose(base64.b64encode(ciphertext).decode())
        assert refusal(SAFE_MODE.open, vector_query(SAFE), body, NOW) is Code.SIGNATURE_MISMATCH
    for token, key in ((TOKEN[:-1] + "B", ENCODING_AES_KEY), (TOKEN, "B" + ENCODING_AES_KEY[1:])):
        push = MessagePush(token, key, APP_ID)
        assert refusal(push.open, vector_query(SAFE), enclose(SAFE["encrypt"]), NOW) is Code.SIGNATURE_MISMATCH


@pytest.mark.parametrize("encrypt_type", [{}, {"encrypt_type": "raw"}, {"encrypt_type": "aes"}])
def test_in_safe_mode_the_plain_signature_proves_nothing(encrypt_type: dict[str, str]) -> None:
    query, body = sign() | encrypt_type, PLAIN["body"].encode()
    assert refusal(SAFE_MODE.open, query, body, NOW) is Code.SIGNATURE_MISMATCH
    for wrong in ("", "0" * 40, query["signature"], "\ud800"):
        forged = query | {"msg_signature": wrong}
        for sent in (body, enclose(encrypt(body.decode())), enclose("")):
            assert refusal(SAFE_MODE.open, forged, sent, NOW) is Code.SIGNATURE_MISMATCH


NOT_ENCRYPTED = [PLAIN["body"].encode(), b"{}", b"<xml/>", b"<xml><Event>e</Event></xml>"]
MALFORMED_ENCRYPT = [enclose(encrypted) for encrypted in (None, 1, [], {}, [encrypt("{}")])]


@pytest.mark.parametrize("body", [*NOT_ENCRYPTED, *MALFORMED_ENCRYPT])
def test_in_safe_mode_a_body_without_encrypted_text_is_refused(body: bytes) -> None:
    without = {name: sign("")[name] for name in ("timestamp", "nonce", "msg_signature")}
    for query in (sign(""), sign(encrypt("{}")), vector_query(SAFE), without):
        assert refusal(SAFE_MODE.open, query, body, NOW) is Code.SIGNATURE_MISMATCH


def test_the_settings_decide_the_mode_and_safe_mode_reads_only_the_encrypted_part() -> None:
    encrypted = encrypt('{"MsgType":"event"}')
    body = enclose(encrypted, MsgType="text", Content="forged")  # as in compatibility mode
    query = sign(encrypted)
    without = {name: value for name, value in query.items() if name not in ("encrypt_type", "signature")}
    for one in (query, without, without | {"encrypt_type": "raw", "signature": "?"}):
        assert SAFE_MODE.open(one, body, NOW) == ({"MsgType": "event"}, "json")
    assert PLAIN_MODE.open(query, body, NOW).kind == ("text", "")


def test_in_plain_mode_an_encrypted_body_is_not_recent() -> None:
    encrypted = encrypt(f'{{"MsgType":"event","CreateTime":{NOW}}}')
    for body in (enclose(encrypted), f"<xml><Encrypt>{encrypted}</Encrypt></xml>".encode()):
        assert not PLAIN_MODE.open(sign(encrypted), body, NOW).is_recent(NOW)


def test_a_message_for_another_account_is_refused() -> None:
    for app_id in ("wx0123456789abcdef", ""):
        assert refusal(open_encrypted, SAFE_MODE, "{}", app_id=app_id) is Code.SIGNATURE_MISMATCH


def test_a_timestamp_must_be_near_our_clock() -> None:
    assert WINDOW_SECONDS == 300
    for offset, is_near in ((-301, False), (-300, True), (0, True), (300, True), (301, False)):
        query = sign(encrypt("{}"), timestamp=NOW + offset) | {"echostr": "e"}
        for call in (
            lambda query=query: verify_url(query, NOW),
            lambda query=query: PLAIN_MODE.open(query, b"{}", NOW),
            lambda query=query: SAFE_MODE.open(query, enclose(encrypt("{}")), NOW),
        ):
            if is_near:
                call()
            else:
                assert refusal(call) is Code.SIGNATURE_MISMATCH


FORMATS = ["", "{}.0", "-1", "+{}", " {}", "{}\n", "nan", "{:_}", "１７１４１１２４４５", "{:013}", "9" * 5000]


@pytest.mark.parametrize("timestamp", [text.format(NOW) for text in FORMATS])
def test_a_timestamp_has_at_most_12_digits(timestamp: str) -> None:
    assert refusal(PLAIN_MODE.open, sign(timestamp=timestamp), b"{}", NOW) is Code.SIGNATURE_MISMATCH
    assert PLAIN_MODE.open(sign(timestamp=f"{NOW:012}"), b"{}", NOW).fields == {}


def test_without_one_of_its_parameters_a_request_is_refused() -> None:
    encrypted = encrypt("{}")
    calls = [(verify_url,), (PLAIN_MODE.open, b"{}"), (SAFE_MODE.open, enclose(encrypted))]
    for call, *body in calls:
        query = sign(*([encrypted] if call == SAFE_MODE.open else []))
        for name in ("msg_signature" if call == SAFE_MODE.open else "signature", "timestamp", "nonce"):
            incomplete = {other: value for other, value in query.items() if other != name}
            assert refusal(call, incomplete, *body, NOW) is Code.SIGNATURE_MISMATCH


# Bodies


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        (b"{}", {}),
        (b' \r\n\t{"a": [1, {"b": null}]}\n', {"a": [1, {"b": None}]}),
        (b"<xml/>", {}),
        (b"<xml>text</xml>", {}),
        (b"\r\n <xml><a>1</a></xml>\n", {"a": "1"}),
        (b'\n<?xml version="1.0" encoding="gbk"?><xml><a>\xe5\xbe\xae</a></xml>', {"a": "微"}),
        (b"<xml><a><![CDATA[ <&\xf0\x9f\x98\x80> ]]></a><b></b><c/></xml>", {"a": " <&😀> ", "b": "", "c": ""}),
        (b"<xml><a>1<!-- -->2&lt;&#65;</a></xml>", {"a": "12<A"}),
        (b"<xml><a>1</a><b/><a>2</a><a><c>3</c></a></xml>", {"a": ["1", "2", {"c": "3"}], "b": ""}),
        (b"<xml> <a> <b>1</b> <b>2</b> </a> </xml>", {"a": {"b": ["1", "2"]}}),
        (b"<xml>" + b"<a>" * 32 + b"</a>" * 32 + b"</xml>", None),
    ],
)
def test_json_and_xml_are_read(body: bytes, fields: dict[str, Any]) -> None:
    opened = open_plain(PLAIN_MODE, body)
    assert fields in (None, opened.fields)
    assert opened.form == ("xml" if b"<" in body[:4] else "json")
    assert open_encrypted(SAFE_MODE, body.decode()).fields == opened.fields


LAUGHS = "".join(f"<!ENTITY a{n} '{f'&a{n - 1};' * 10}'>" for n in range(1, 10))


MALFORMED_JSON = [b"", b" ", b"success", b"[]", b"null", b'"<xml/>"', b"{", b'{"a": "\\x"}', b'{"a": "\\ud83"}']
MALFORMED_XML = [b"<", b"<xml>", b"<xml/><xml/>", b"<a/>", b"<XML/>", b"<xml xmlns='urn:a'/>", b"<xml></a></xml>"]
ENTITIES = [
    f"<!DOCTYPE xml [<!ENTITY a0 'ha'>{LAUGHS}]><xml><a>&a9;</a></xml>".encode(),
    b"<!DOCTYPE xml [<!ENTITY a SYSTEM 'file:///etc/passwd'>]><xml><a>&a;</a></xml>",
    b"<!DOCTYPE xml [<!ENTITY % a SYSTEM 'http://127.0.0.1/a'>%a;]><xml/>",
    b"<!DOCTYPE xml SYSTEM 'http://127.0.0.1/a.dtd'><xml/>",
    b"<!DOCTYPE xml><xml/>",
]
TOO_DEEP = [
    b'{"a": ' + b"[" * 100_000,
    b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}",
    b"<xml>" + b"<a>" * 33 + b"</a>" * 33 + b"</xml>",
    b"<a>" * 100_000 + b"</a>" * 100_000,
]


@pytest.mark.parametrize("body", [*MALFORMED_JSON, *MALFORMED_XML, *ENTITIES, *TOO_DEEP])
def test_a_malformed_body_is_named(body: bytes) -> None:
    assert set(errors_of(PLAIN_MODE.open, sign(), body) or ()) == {"body"}
    assert set(errors_of(SAFE_MODE.open, sign(""), body) or ()) == {"body"}
    assert refusal(open_encrypted, SAFE_MODE, body.decode()) is Code.INVALID_INPUT
    forged = sign() | {"signature": "0" * 40}
    assert refusal(PLAIN_MODE.open, forged, body, NOW) is Code.SIGNATURE_MISMATCH  # which is checked first


@pytest.mark.parametrize(
    ("body", "content", "is_malformed"),
    [
        (b"<Content><![CDATA[a\x1db]]></Content>", "a\ufffdb", True),
        (b"<Content><![CDATA[a\x00]]></Content>", "a\ufffd", True),
        (b"<Content><![CDATA[\xe5\xbe\xae\xe4\xbf]]></Content>", "微\ufffd", True),
        (b"<Content><![CDATA[a\xed\xa0\xbd]]></Content>", "a\ufffd\ufffd\ufffd", True),
        (b"<Content><![CDATA[&#29; &nbsp; &]]></Content>", "&#29; &nbsp; &", False),
        (b"<Content>a&#38;b &amp;lt;</Content>", "a&b &lt;", False),
    ],
)
@pytest.mark.parametrize(("before", "after"), [("", ""), ("\ufeff\n ", "\x00\r\n"), ("", "trailing <data>")])
def test_malformed_xml_is_read_and_logged(
    caplog: pytest.LogCaptureFixture, body: bytes, content: str, is_malformed: bool, before: str, after: str
) -> None:
    whole = before.encode() + b"<xml>" + body + b"</xml>" + after.encode()
    encrypted = encrypt_bytes(whole)
    for opened in (open_plain(PLAIN_MODE, whole), SAFE_MODE.open(sign(encrypted), enclose(encrypted), NOW)):
        assert opened.fields == {"Content": content}
        if is_malformed:
            assert vars(caplog.records[-1])["interface"] == "message push"


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        (b'{"Content": "a\x1db\\u0000\\b"}', {"Content": "a\ufffdb\ufffd\ufffd"}),
        (b'{"Content": "a\tb\nc\\u000a"}', {"Content": "a\tb\nc\n"}),
        (b'{"Content": "\\ud83d"}', {"Content": "\ufffd"}),
        (b'{"Content": "\\ud83d\\ude00\\ude00\\\\ud83d"}', {"Content": "😀\ufffd\\ud83d"}),
        (b'{"Content": "\xe5\xbe"}', {"Content": "\ufffd"}),
        (b'{"a": 1, "a": 2}', {"a": 2}),
        (b'\xef\xbb\xbf{"a": NaN}\x00', {"a": "NaN"}),
        (b'{"a\x14": 1} and more', {"a\ufffd": 1}),
    ],
)
def test_malformed_json_is_read(body: bytes, fields: dict[str, Any]) -> None:
    assert open_plain(PLAIN_MODE, body).fields == fields
    encrypted = encrypt_bytes(body)
    assert SAFE_MODE.open(sign(encrypted), enclose(encrypted), NOW).fields == fields


@pytest.mark.parametrize("body", ["<xml/>".encode("utf-16"), "{}".encode("utf-16")])
def test_a_body_in_another_encoding_is_malformed(body: bytes) -> None:
    assert set(errors_of(PLAIN_MODE.open, sign(), body) or ()) == {"body"}


@pytest.mark.parametrize("outer", FORMS)
@pytest.mark.parametrize("inner", ['{"a":"1"}', "<xml><a>1</a></xml>"])
def test_the_form_is_that_of_the_outer_body(outer: Form, inner: str) -> None:
    encrypted = encrypt(inner)
    body = enclose(encrypted) if outer == "json" else f"<xml><Encrypt>{encrypted}</Encrypt></xml>".encode()
    assert SAFE_MODE.open(sign(encrypted), body, NOW) == ({"a": "1"}, outer)


# Messages


def test_a_repeated_message_and_no_other_has_the_same_key() -> None:
    event = {"FromUserName": "o-wechat", "CreateTime": 1, "Event": "e", "OpenID": "o-a"}
    different = [
        {"MsgId": 1},
        {"MsgId": 12},
        {"MsgId": "1", "Content": "a"},
        *(
            event | change
            for change in ({}, {"FromUserName": "o-b"}, {"CreateTime": 2}, {"Event": "f"}, {"OpenID": "b"})
        ),
        {"FromUserName": "o-a1", "CreateTime": "1", "Event": "e"},
        {"FromUserName": "o-a", "CreateTime": "11", "Event": "e"},
        *({}, {"a": "b"}, {"MsgId": "", "a": 1}),
        {"MsgId": None, "Event": "", "a": {"b": ["微"]}},
    ]
    keys = [PushMessage(fields, "json").key for fields in different]
    assert len(set(keys)) == len(different)
    assert all(len(key) == 64 and set(key) <= set("0123456789abcdef") for key in keys)
    assert PushMessage({"MsgId": 1, "Content": "a"}, "json").key == keys[0]
    assert PushMessage({"a": 1, "b": 2}, "json").key == PushMessage({"b": 2, "a": 1}, "json").key


def test_the_type_and_the_event_are_text() -> None:
    for value in (1, ["event"], {"a": "b"}, ""):
        message = PushMessage({"MsgType": value, "Event": value}, "json")
        assert message.kind == (str(value), str(value))
    assert PushMessage({}, "json").kind == ("", "")


# Replies


def test_a_reply_has_the_format_and_mode_of_the_account() -> None:
    reply = {"ToUserName": "o-a", "CreateTime": NOW, "Content": "微信<&>😀", "Articles": {"item": [{"Url": "a"}, None]}}
    assert json.loads(PLAIN_MODE.seal(reply, "json", NOW)) == reply
    assert "微信<&>😀" in PLAIN_MODE.seal(reply, "json", NOW)  # as it is, in UTF-8
    assert PLAIN_MODE.seal(reply, "xml", NOW) == (
        f"<xml><ToUserName>o-a</ToUserName><CreateTime>{NOW}</CreateTime><Content>微信&lt;&amp;&gt;😀</Content>"
        "<Articles><item><Url>a</Url></item><item></item></Articles></xml>"
    )
    sealed = json.loads(SAFE_MODE.seal(reply, "json", NOW))
    root = ElementTree.fromstring(SAFE_MODE.seal(reply, "xml", NOW))
    assert (root.tag, [child.tag for child in root]) == ("xml", list(sealed))


def test_equal_replies_are_sealed_differently() -> None:
    sealed = [json.loads(SAFE_MODE.seal({}, "json", NOW)) for _ in range(20)]
    assert len({reply["Nonce"] for reply in sealed}) == len({reply["Encrypt"] for reply in sealed}) == 20


def test_characters_that_xml_cannot_hold_are_dropped() -> None:
    text = "a\x00\x0b\ufffe\ud800\r\n\t\x7f\U0001f600"
    assert open_plain(PLAIN_MODE, PLAIN_MODE.seal({"a": text}, "xml", NOW).encode()).fields == {
        "a": "a\r\n\t\U0001f600"
    }
    SAFE_MODE.seal({"a": text}, "xml", NOW)
    for mode in (PLAIN_MODE, SAFE_MODE):  # half a surrogate pair
        with pytest.raises(UnicodeEncodeError):
            mode.seal({"a": text}, "json", NOW)
    without = text.replace("\ud800", "")
    assert json.loads(PLAIN_MODE.seal({"a": without}, "json", NOW)) == {"a": without}


def test_nan_in_json_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="float"):
        PLAIN_MODE.seal({"a": float("nan")}, "json", NOW)


# Any input


@given(st.dictionaries(st.sampled_from(["signature", "msg_signature", "timestamp", "nonce", "echostr"]), ANY_TEXT))
def test_any_query_is_refused(query: dict[str, str]) -> None:
    for push in (PLAIN_MODE, SAFE_MODE):
        for call in (lambda push=push: verify_url(query, NOW, push), lambda push=push: push.open(query, b"{}", NOW)):
            assert refusal(call) in (Code.INVALID_INPUT, Code.SIGNATURE_MISMATCH)


TAGS = st.lists(st.sampled_from(["<xml>", "</xml>", "<a>", "</a>", "<b/>", "&lt;", "<![CDATA[", "]]>", "<!--", "text"]))


@given(
    st.binary()
    | ANY_TEXT.map(lambda text: text.encode("utf-8", "surrogatepass"))
    | JSON.map(lambda document: json.dumps(document).encode())
    | TAGS.map(lambda tags: f"<xml>{''.join(tags)}</xml>".encode())
)
def test_any_body_is_read_or_refused(body: bytes) -> None:
    assert refusal(SAFE_MODE.open, sign(""), body, NOW) in (Code.INVALID_INPUT, Code.SIGNATURE_MISMATCH)
    text = body.decode("utf-8", "replace")
    for opened in (outcome(open_plain, PLAIN_MODE, body), outcome(open_encrypted, SAFE_MODE, text)):
        if opened is not Code.INVALID_INPUT:
            assert json.loads(json.dumps(opened.fields)) == opened.fields
            assert (len(opened.key), [type(name) for name in opened.kind]) == (64, [str, str])


@given(JSON_OBJECTS, ANY_TEXT, st.text(min_size=1))
def test_any_reply_in_json_can_be_opened(reply: dict[str, Any], nonce: str, token: str) -> None:
    plain, safe = MessagePush(token, "", APP_ID), MessagePush(token, ENCODING_AES_KEY, APP_ID)
    body = plain.seal(reply, "json", NOW).encode()
    assert lenient.read(body, None) == reply
    if "Encrypt" not in reply:
        assert plain.open(sign(nonce=nonce, token=token), body, NOW) == (reply, "json")
    assert reopen(safe, safe.seal(reply, "json", NOW), "json") == (reply, "json")


def reopen(safe: MessagePush, sealed: str, form: Form) -> PushMessage:
    """Open a reply like a message, which is signed and encrypted in the same way."""
    if form == "json":
        fields = json.loads(sealed)
    else:
        fields = {child.tag: child.text for child in ElementTree.fromstring(sealed)}
    query = {"msg_signature": fields["MsgSignature"], "timestamp": str(fields["TimeStamp"]), "nonce": fields["Nonce"]}
    return safe.open(query, sealed.encode(), NOW)


def xml_elements(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.dictionaries(NAMES, values | st.lists(values, min_size=2, max_size=3), min_size=1, max_size=3)


@given(st.just({}) | xml_elements(st.recursive(XML_TEXT, xml_elements, max_leaves=8)))
def test_any_reply_in_xml_can_be_opened(reply: dict[str, Any]) -> None:
    assert open_plain(PLAIN_MODE, PLAIN_MODE.seal(reply, "xml", NOW).encode()) == (reply, "xml")
    assert reopen(SAFE_MODE, SAFE_MODE.seal(reply, "xml", NOW), "xml") == (reply, "xml")


@given(st.dictionaries(NAMES, JSON | ANY_TEXT), st.sampled_from(FORMS))
def test_any_reply_can_be_sealed(reply: dict[str, Any], form: Form) -> None:
    try:
        sealed = PLAIN_MODE.seal(reply, form, NOW)
    except UnicodeEncodeError:
        assert form == "json"
    else:
        sealed.encode()


# wechatpy


NOT_IN_XML = {13: None}
"""XML reads \\r as a line feed."""


def test_messages_are_exchanged_with_wechatpy() -> None:
    chance = random.Random(1)
    for _ in range(2000):
        token, key = (
            "".join(chance.choices(string.ascii_letters + string.digits, k=count))
            for count in (chance.randint(3, 32), 43)
        )
        app_id, nonce = f"wx{chance.getrandbits(64):016x}", str(chance.getrandbits(32))
        push, theirs = MessagePush(token, key, app_id), WeChatCrypto(token, key, app_id)
        fields = {"MsgType": "text", "MsgId": nonce, "Content": any_text(chance).translate(NOT_IN_XML)}

        in_xml = f"<xml>{''.join(f'<{name}>{escape(text)}</{name}>' for name, text in fields.items())}</xml>"
        body = theirs.encrypt_message(in_xml, nonce, str(NOW))
        encrypted = ElementTree.fromstring(body).findtext("Encrypt", "")
        query = sign(encrypted, nonce=nonce, token=token)
        assert ElementTree.fromstring(body).findtext("MsgSignature") == query["msg_signature"]
        assert push.open(query, body.encode(), NOW) == (fields, "xml")

        in_json = json.dumps(fields, ensure_ascii=chance.random() < 0.5)
        encrypted = PrpCrypto(decode_aes_key(key)).encrypt(in_json, app_id).decode()
        query = sign(encrypted, nonce=nonce, token=token)
        assert push.open(query, enclose(encrypted), NOW) == (fields, "json")

        sealed = push.seal(fields, "xml", NOW)
        signed = {child.tag: child.text or "" for child in ElementTree.fromstring(sealed)}
        text = theirs.decrypt_message(sealed, signed["MsgSignature"], signed["TimeStamp"], signed["Nonce"])
        assert {child.tag: child.text or "" for child in ElementTree.fromstring(text)} == fields

        signed = json.loads(push.seal(fields, "json", NOW))
        text = theirs.decrypt_message(signed, signed["MsgSignature"], str(signed["TimeStamp"]), signed["Nonce"])
        assert json.loads(text) == fields
