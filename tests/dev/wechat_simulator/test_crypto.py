"""The simulator's cryptography against the examples that WeChat and the known SDKs publish."""

import base64

import pytest

from dev.wechat_simulator import crypto

# https://developers.weixin.qq.com/miniprogram/dev/framework/open-ability/signature.html and its sample code
ENCRYPTED_DATA = (
    "CiyLU1Aw2KjvrjMdj8YKliAjtP4gsMZMQmRzooG2xrDcvSnxIMXFufNstNGTyaGS9uT5geRa0W4oTOb1WT7fJlAC+oNPdbB+3hVbJSRgv"
    "+4lGOETKUQz6OYStslQ142dNCuabNPGBzlooOmB231qMM85d2/fV6ChevvXvQP8Hkue1poOFtnEtpyxVLW1zAo6/1Xx1COxFvrc2d7UL/"
    "lmHInNlxuacJXwu0fjpXfz/YqYzBIBzD6WUfTIF9GRHpOn/Hz7saL8xz+W//FRAUid1OksQaQx4CMs8LOddcQhULW4ucetDf96JcR3g0g"
    "fRK4PC7E/r7Z6xNrXd2UIeorGj5Ef7b1pJAYB6Y5anaHqZ9J6nKEBvB4DnNLIVWSgARns/8wR2SiRS7MNACwTyrGvt9ts8p12PKFdlqYT"
    "opNHR1Vf7XjfhQlVsAJdNiKdYmYVoKlaRv85IfVunYzO0IKXsyl7JCUjCpoG20f0a04COwfneQAGGwd5oa+T8yO5hzuyDb/XcxxmK01Ep"
    "qOyuxINew=="
)
USER_INFO = (
    '{"openId":"oGZUI0egBJY1zhBYw2KhdUfwVJJE","nickName":"Band","gender":1,"language":"zh_CN","city":"Guangzho'
    'u","province":"Guangdong","country":"CN","avatarUrl":"http://wx.qlogo.cn/mmopen/vi_32/aSKcBBPpibyKNicHNTM'
    'M0qJVh8Kjgiak2AHWr8MHM4WgMEm7GFhsf8OYrySdbvAMvTsw3mo8ibKicsnfN5pRjl1p8HQ/0","unionId":"ocMvos6NjeKLIBqg5M'
    'r9QjxrP1FA","watermark":{"timestamp":1477314187,"appid":"wx4f4bc4dec97d474b"}}'
)
RAW_DATA = (
    '{"nickName":"Band","gender":1,"language":"zh_CN","city":"Guangzhou","province":"Guangdong","country":"CN"'
    ',"avatarUrl":"http://wx.qlogo.cn/mmopen/vi_32/1vZvI39NWFQ9XM4LtQpFrQJ1xlgZxx3w7bQxKARol6503Iuswjjn6nIGBia'
    'ycAjAtpujxyzYsrztuuICqIM5ibXQ/0"}'
)
# https://developers.weixin.qq.com/miniprogram/dev/framework/server-ability/message-push.html
AES_KEY, APP_ID = "A" * 43, "wxba5fad812f8e6fb9"
ENCRYPTED_PUSH = (
    "+qdx1OKCy+5JPCBFWw70tm0fJGb2Jmeia4FCB7kao+/Q5c/ohsOzQHi8khUOb05JCpj0JB4RvQMkUyus8TPxLKJGQqcvZqzDpVzazhZv6"
    "JsXUnnR8XGT740XgXZUXQ7vJVnAG+tE8NUd4yFyjPy7GgiaviNrlCTj+l5kdfMuFUPpRSrfMZuMcp3Fn2Pede2IuQrKEYwKSqFIZoNqJ4"
    "M8EajAsjLY2km32IIjdf8YL/P50F7mStwntrA2cPDrM1kb6mOcfBgRtWygb3VIYnSeOBrebufAlr7F9mFUPAJGj04="
)
PUSHED = (
    '{"ToUserName":"gh_97417a04a28d","FromUserName":"o9AgO5Kd5ggOC-bXrbNODIiE3bGY","CreateTime":1714112445,"Ms'
    'gType":"event","Event":"debug_demo","debug_str":"hello world"}'
)
ENCRYPTED_REPLY = "ELGduP2YcVatjqIS+eZbp80MNLoAUWvzzyJxgGzxZO/5sAvd070Bs6qrLARC9nVHm48Y4hyRbtzve1L32tmxSQ=="
REPLY = '{"demo_resp":"good luck"}'


def test_encrypted_data_is_that_of_the_sample() -> None:
    iv = base64.b64decode("r7BXXKkLb8qrSNn05n0qiA==")
    assert crypto.encrypt_data("tiihtNczf5v6AKRyjwEUhQ==", iv, USER_INFO) == ENCRYPTED_DATA


def test_raw_data_is_signed_as_in_the_documentation() -> None:
    signature = crypto.raw_data_signature("HyVFkGl5F5OQWJZZaNzBBg==", RAW_DATA)
    assert signature == "75e81ceda165f4ffa64f4068af58c64b8f54b88c"


def test_the_session_signature_is_keyed_by_the_text_of_the_key() -> None:
    signature = crypto.session_signature("o0q0otL8aEzpcZL/FT9WsQ==", b'{"foo":"bar"}')
    assert signature == "654571f79995b2ce1e149e53c0a33dc39c0a74090db514261454e8dbe432aa0b"


@pytest.mark.parametrize(
    ("parts", "signature"),
    [
        (("AAAAA", "1714036504", "1514711492"), "f464b24fc39322e44b38aa78f5edd27bd1441696"),
        (("AAAAA", "1714037059", "486452656"), "899cf89e464efb63f54ddac96b0a0a235f53aa78"),
        (("AAAAA", "1714112445", "415670741"), "6c5c811b55cc85e0e1b54100749188c20beb3f5d"),
        (("AAAAA", "1714112445", "415670741", ENCRYPTED_PUSH), "046e02f8204d34f8ba5fa3b1db94908f3df2e9b3"),
        (("AAAAA", "1713424427", "415670741", ENCRYPTED_REPLY), "1b9339964ed2e271e7c7b6ff2b0ef902fc94dea1"),
    ],
    ids=["verification", "plain", "safe", "safe message", "safe reply"],
)
def test_pushes_are_signed_as_in_the_documentation(parts: tuple[str, ...], signature: str) -> None:
    assert crypto.push_signature(*parts) == signature


@pytest.mark.parametrize(
    ("message", "prefix", "encrypted"),
    [(PUSHED, b"a8eedb185eb2fecf", ENCRYPTED_PUSH), (REPLY, b"707722b803182950", ENCRYPTED_REPLY)],
    ids=["message", "reply"],
)
def test_pushes_are_encrypted_as_in_the_documentation(message: str, prefix: bytes, encrypted: str) -> None:
    assert crypto.encrypt_message(AES_KEY, message.encode(), APP_ID, prefix) == encrypted
    assert crypto.decrypt_message(AES_KEY, encrypted) == (message.encode(), APP_ID)


def test_each_push_is_encrypted_differently() -> None:
    first, second = (crypto.encrypt_message(AES_KEY, b"{}", APP_ID) for _ in range(2))
    assert first != second


@pytest.mark.parametrize("encrypted", ["", "AAAA", "A" * 43 + "=", "not base64!", ENCRYPTED_PUSH[:-24]])
def test_what_was_not_encrypted_so_is_not_decrypted(encrypted: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        crypto.decrypt_message(AES_KEY, encrypted)
