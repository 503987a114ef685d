"""The routes by which tests control users, faults and WeChat's clock, and read what happened."""

import base64
import json
import secrets
from typing import Any

from flask import Blueprint, current_app

from dev.wechat_simulator import crypto
from dev.wechat_simulator.faults import FAULTS
from dev.wechat_simulator.wire import control_body
from dev.wechat_simulator.world import (
    CODE_SECONDS,
    Fault,
    LoginCode,
    Memory,
    Person,
    PhoneCode,
    World,
    new_code,
    new_openid,
)

NOT_IN_RAW_DATA = ("openId", "unionId", "phoneNumber", "purePhoneNumber", "countryCode")


def control(world: World) -> Blueprint:
    """Make the routes below /simulator, except those of the push."""
    blueprint = Blueprint("control", __name__, url_prefix="/simulator")

    @blueprint.delete("")
    def reset() -> dict[str, str]:
        with world.lock:
            world.memory = Memory()
        return {}

    @blueprint.post("/clock")
    def advance_clock() -> dict[str, float]:
        seconds = control_body("advance")["advance"]
        with world.lock:
            world.memory.offset += seconds
            return {"now": world.now()}

    @blueprint.post("/secret")
    def reset_secret() -> dict[str, str]:
        secret = control_body("secret")["secret"]
        with world.lock:
            world.secrets[world.app_id] = secret
        return {}

    @blueprint.get("/calls")
    def list_calls() -> dict[str, Any]:
        with world.lock:
            return {"calls": list(world.memory.calls)}

    @blueprint.get("/secrets")
    def list_secrets() -> dict[str, list[str]]:
        with world.lock:
            return {"secrets": world.memory.secrets()}

    @blueprint.post("/faults")
    def add_fault() -> tuple[dict[str, str], int]:
        wanted = control_body()
        paths = [rule.rule for rule in current_app.url_map.iter_rules() if not rule.rule.startswith("/simulator")]
        if wanted.get("kind") not in FAULTS or wanted.get("path") not in paths:
            return {"error": f"kind must be one of {', '.join(FAULTS)}, and path of {', '.join(paths)}"}, 400
        with world.lock:
            world.memory.faults[wanted["path"]] = Fault(
                kind=wanted["kind"],
                times=wanted.get("times", 1),
                seconds=wanted.get("seconds", 10),
                errcode=wanted.get("errcode", -1),
            )
        return {}, 201

    @blueprint.post("/codes")
    def make_code() -> dict[str, str]:
        wanted = control_body()
        code, openid = new_code(), wanted.get("openid") or new_openid()
        with world.lock:
            world.memory.codes[code] = LoginCode(
                openid=openid,
                unionid=wanted.get("unionid"),
                expires_at=world.now() + wanted.get("expires_in", CODE_SECONDS),
            )
        return {"code": code, "openid": openid}

    @blueprint.get("/session_keys/<openid>")
    def get_session_key(openid: str) -> dict[str, str | None]:
        with world.lock:
            return {"session_key": world.memory.session_keys.get(openid)}

    @blueprint.post("/user_data")
    def encrypt_user_data() -> tuple[dict[str, str], int]:
        wanted = control_body("openid", "data")
        with world.lock:
            session_key = world.memory.session_keys.get(wanted["openid"])
        if session_key is None:
            return {"error": "this openid has not logged in"}, 404
        timestamp = int(world.now() - wanted.get("age", 0))
        watermark = {"timestamp": timestamp, "appid": wanted.get("app_id", world.app_id)}
        iv = secrets.token_bytes(16)
        raw_data = _compact({name: value for name, value in wanted["data"].items() if name not in NOT_IN_RAW_DATA})
        return {
            "encryptedData": crypto.encrypt_data(session_key, iv, _compact({**wanted["data"], "watermark": watermark})),
            "iv": base64.b64encode(iv).decode(),
            "rawData": raw_data,
            "signature": crypto.raw_data_signature(session_key, raw_data),
        }, 200

    @blueprint.post("/phone_codes")
    def make_phone_code() -> dict[str, str]:
        wanted = control_body()
        code = secrets.token_hex(32)
        with world.lock:
            world.memory.phone_codes[code] = PhoneCode(
                openid=wanted.get("openid"),
                phone=wanted.get("phone") or f"13{secrets.randbelow(10**9):09}",
                country_code=str(wanted.get("country_code", "86")),
                expires_at=world.now() + wanted.get("expires_in", CODE_SECONDS),
            )
        return {"code": code}

    @blueprint.post("/web_user")
    def set_web_user() -> dict[str, str | None]:
        wanted = control_body()
        names = ("unionid", "nickname", "avatar_url", "snapshot")
        details = {name: wanted[name] for name in names if wanted.get(name) is not None}
        person = Person(wanted.get("openid") or new_openid(), **details)
        with world.lock:
            world.memory.browsing = person
        return {"openid": person.openid, "unionid": person.unionid}

    @blueprint.post("/subscriptions")
    def subscribe() -> dict[str, str]:
        wanted = control_body("openid", "template_id")
        with world.lock:
            world.memory.templates.add(wanted["template_id"])
            world.memory.acceptances[wanted["openid"], wanted["template_id"]] += wanted.get("times", 1)
        return {}

    @blueprint.get("/subscribe_messages")
    def list_subscribe_messages() -> dict[str, Any]:
        with world.lock:
            return {"messages": list(world.memory.subscribe_messages)}

    @blueprint.get("/customer_messages")
    def list_customer_messages() -> dict[str, Any]:
        with world.lock:
            return {"messages": list(world.memory.customer_messages)}

    @blueprint.get("/access_token")
    def get_access_token() -> dict[str, Any]:
        with world.lock:
            token, seconds = world.memory.tokens.current(world.now()) or (None, None)
        return {"access_token": token, "expires_in": seconds}

    @blueprint.get("/access_tokens")
    def list_access_tokens() -> dict[str, Any]:
        with world.lock:
            return {"forced": world.memory.tokens.forced, "uses": list(world.memory.tokens.uses.values())}

    @blueprint.delete("/access_token")
    def drop_access_token() -> dict[str, str]:
        with world.lock:
            world.memory.tokens.drop()
        return {}

    return blueprint


def _compact(data: dict[str, Any]) -> str:
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"))
