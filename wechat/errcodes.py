"""What WeChat's errcodes mean: who is at fault, and so which code our caller gets and who must act.

A code below 500 is not counted as a failure of WeChat's. The runbooks in deploy/prometheus/rules.yml explain the same
errcodes; a test compares them. Sources: https://developers.weixin.qq.com/doc/oplatform/developers/errCode/errCode.html
and the pages of the single interfaces.
"""

from errors import Code, Message

INVALID_TOKEN = frozenset({40001, 40014, 42001})
"""The access token is invalid or has expired: get a new one and call once more."""
SESSION_ENDED = frozenset({40003, 87007, 87009})
"""At wxa/checksession: the openid is unknown, or the session_key is not, or no longer, the user's."""
AUTHORIZATION_ENDED = INVALID_TOKEN | {40003, 40029, 40030, 42002, 42003, 42007, 50001, 61023}
"""At sns/oauth2/refresh_token, where the token is the user's and not ours: invalid or expired, the openid is unknown,
the user has withdrawn the authorization or changed the password (42007)."""
NOT_SUBSCRIBED = frozenset({43101})

ERRCODES = {
    # WeChat: busy, or a quota is used up: 44990 calls per second, 45009 per day, 45011 per minute, 43108 to one user.
    Code.UNAVAILABLE: {-1, 43108, 44990, 45009, 45011},
    # The caller: 40029 invalid, 41008 missing, 42003 expired, 40163 used, the others of the first line: the user's
    # authorization has ended; 61010 the author's last visit to the mini-program was more than two hours ago; 87014 and
    # 45168 forbidden content.
    Code.WECHAT_CODE_INVALID: {40029, 40030, 41008, 42002, 42003, 42007, 61023},
    Code.WECHAT_CODE_USED: {40163},
    Code.WECHAT_HIGH_RISK_USER: {40226},
    Code.SESSION_KEY_STALE: {61010},
    Code.CONTENT_REFUSED: {45168, 87014},
    # The addressee of a message: does not follow the account, has blocked it, accepts no message, or none for now.
    Code.CONFLICT: {43004, 43019, 43101, 45015, 45047, 48002},
    # The account: app id, secret, token, IP address or permissions. An operator must act at mp.weixin.qq.com.
    Code.WECHAT_REFUSED: {40001, 40013, 40014, 40125, 40164, 40243, 41002, 41004, 42001, 43107, 43116, 48001, 48003}
    | {48004, 50001, 50002, 50004, 50007, 61004, 61024, 89501, 89503, 89506, 89507},
    # Us: a parameter, body or template of ours is missing or wrong. The code must be changed.
    Code.INTERNAL_ERROR: {40002, 40003, 40007, 40008, 40035, 40037, 40066, 40097, 40129, 40165, 40169, 40212, 41001}
    | {41003, 41005, 41006, 41007, 41009, 41030, 43001, 43002, 43003, 43104, 43302, 44001, 44002, 44003, 44004}
    | {45001, 45002, 47001, 47003, 85064, 87007, 87008, 87009},
}
_CODES_AT = {("/wxa/business/getuserphonenumber", 40003): Code.WECHAT_CODE_INVALID}
"""Where an interface means something else: the phone code is another user's."""
MESSAGES = {61010: Message("请在小程序中调用 wx.login 后再提交", "Call wx.login in the mini-program, then send again")}
"""Where the code's own message would mislead."""


def code_of(interface: str, errcode: int) -> Code:
    """The code for an errcode of an interface; UPSTREAM_INVALID for an unknown errcode."""
    here = _CODES_AT.get((interface, errcode))
    return here or next((code for code in ERRCODES if errcode in ERRCODES[code]), Code.UPSTREAM_INVALID)
