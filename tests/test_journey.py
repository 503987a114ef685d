"""A user from the first login to the last logout, on two instances of the service."""

import time

import pytest
import requests

from tests.harness import WAIT_SECONDS, Service, Simulator, wait_until


class Browser(requests.Session):
    """A browser that sends secure cookies to 127.0.0.1 too, and follows no redirect."""

    def get(self, url: str) -> requests.Response:
        answer = super().get(url, timeout=WAIT_SECONDS, allow_redirects=False)
        for cookie in self.cookies:
            cookie.secure = False
        return answer


@pytest.mark.database
def test_the_journey_of_a_user_on_two_instances(services: tuple[Service, Service], simulator: Simulator) -> None:
    one, other = services
    openid, unionid = "o-journey", "u-journey"

    # The mini-program: login, phone number by code, profile as WeChat encrypts it.
    token = one.log_in(simulator, openid=openid, unionid=unionid)
    code = simulator.phone_code(openid=openid, phone="13812345678")
    phone = other.call("PUT", "/users/me/phone", token, json={"code": code})
    assert (phone.status_code, phone.json()["data"]["phone"]) == (200, "138****5678")
    profile = {"openId": openid, "nickName": "阿上", "avatarUrl": "https://thirdwx.qlogo.cn/mmopen/0/132"}
    stored = one.call("PUT", "/users/me/profile", token, json=simulator.user_data(openid, profile))
    assert (stored.status_code, stored.json()["data"]["nickname"]) == (200, "阿上")
    me = other.read_me(token).json()["data"]
    assert (me["phone"], me["nickname"]) == ("138****5678", "阿上")
    assert one.call("GET", "/auth/wechat", token).json()["data"] == {"valid": True}

    # The web: the same user, who starts on one instance and returns to the other.
    browser = Browser()
    simulator.web_user(openid="o-journey-web", unionid=unionid)
    away = browser.get(f"{one.url}/api/v1/auth/wechat/authorize?return_to=/api/v1/users/me&scope=snsapi_userinfo")
    back = simulator.sign_in_on_the_web(away.headers["Location"]).replace(one.url, other.url)
    landed = browser.get(back).headers["Location"]
    assert landed == f"{other.url}/api/v1/users/me"
    assert browser.get(landed).json()["data"] == me
    assert browser.get(f"{one.url}/api/v1/auth/wechat").json()["data"] == {"valid": True}

    # A push: the user revokes the phone number; it reaches both instances and is handled once.
    event = {"MsgType": "event", "Event": "user_authorization_revoke", "OpenID": openid, "CreateTime": int(time.time())}
    event |= {"FromUserName": "o-wechat", "RevokeInfo": "8"}
    for service in (one, other):
        (answer,) = simulator.push(event, url=f"{service.url}/api/v1/wechat/messages")
        assert (answer["status"], answer["body"]) == (200, "success")
    wait_until(lambda: other.read_me(token).json()["data"]["phone"] is None)
    erased = wait_until(
        lambda: [
            line
            for service in (one, other)
            for line in service.log_lines()
            if line["message"] == "personal data erased"
        ]
    )
    assert len(erased) == 1

    # Log out everywhere: neither the token nor the cookie is valid on either instance.
    assert other.call("DELETE", "/auth/sessions", token).status_code == 200
    for service in (one, other):
        assert service.read_me(token).status_code == 401
        assert browser.get(f"{service.url}/api/v1/users/me").status_code == 401
    token = other.log_in(simulator, openid=openid)
    assert one.read_me(token).json()["data"]["id"] == me["id"]
    for service in (one, other):
        assert '"stack"' not in service.log()
