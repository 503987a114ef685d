"""Personal data of a user: masked; in full, which is logged; and the export of everything."""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import msgspec
from flask import Response, current_app
from marshmallow import Schema, fields

from blueprints.api import TIME, VERSION, Blueprint
from blueprints.orders import OrderSchema
from blueprints.users import NICKNAME_RULE, PHONE, Masked, UserSchema, audit, load_user, matches
from concurrency import context_for, room
from errors import Code, Message, envelope
from storage import database, ownership
from storage.masks import mask_bank_card, mask_email, mask_id_card, mask_name, mask_phone
from storage.models import PERSONAL_FIELDS, User

EXPORT_WEIGHT = 4
"""What a part of an export takes of `concurrency.room` while it is read; while the client receives it, nothing."""

_read = room(EXPORT_WEIGHT, seconds=30)(next)
"""Waits longer than a request would, as the response is on its way."""

blueprint = Blueprint("personal_data", __name__, title=Message("个人信息", "Personal data"))
blueprint.cache_control = "no-store"

EXAMPLES = {"phone": PHONE, "real_name": "王小明", "id_card": "11010519491231002X", "email": "xiaoming@example.com"}
EXAMPLES["bank_card"] = "6222020200112230"
ID_CARD_RULE = matches("[0-9]{17}[0-9Xx]", "Must be 18 digits, or 17 and an X.")
EMAIL_RULE = matches("[!-~]{3,254}", "Must be at most 254 ASCII characters.")
BANK_CARD_RULE = matches("[0-9]{12,19}", "Must be 12 to 19 digits.")


class MaskedPersonalDataSchema(Schema):
    phone = Masked(mask_phone, EXAMPLES["phone"])
    real_name = Masked(mask_name, EXAMPLES["real_name"])
    id_card = Masked(mask_id_card, EXAMPLES["id_card"])
    email = Masked(mask_email, EXAMPLES["email"])
    bank_card = Masked(mask_bank_card, EXAMPLES["bank_card"])
    version = VERSION


PersonalDataSchema = Schema.from_dict(
    {
        name: fields.String(required=True, allow_none=True, metadata={"example": EXAMPLES[name]})
        for name in PERSONAL_FIELDS
    },
    name="PersonalDataSchema",
)
FullPersonalDataSchema = PersonalDataSchema.from_dict({"version": VERSION}, name="FullPersonalDataSchema")


class PersonalDataChangeSchema(Schema):
    """Missing fields stay as they are, null erases; a phone number comes from WeChat alone."""

    real_name = fields.String(allow_none=True, validate=NICKNAME_RULE, metadata={"example": EXAMPLES["real_name"]})
    id_card = fields.String(allow_none=True, validate=ID_CARD_RULE, metadata={"example": EXAMPLES["id_card"]})
    email = fields.Email(allow_none=True, validate=EMAIL_RULE, metadata={"example": EXAMPLES["email"]})
    bank_card = fields.String(allow_none=True, validate=BANK_CARD_RULE, metadata={"example": EXAMPLES["bank_card"]})


class IdentitySchema(Schema):
    app_id = fields.String(required=True, metadata={"example": "wx0123456789abcdef"})
    openid = fields.String(required=True, metadata={"example": "oGZUI0egBJY1zhBYw2KhdUfwVJJE"})
    created_at = fields.DateTime(required=True, metadata=TIME)


class ExportSchema(Schema):
    """The lists are those that storage/ownership.py names."""

    user = fields.Nested(UserSchema, required=True)
    unionid = fields.String(required=True, allow_none=True, metadata={"example": None})
    personal_data = fields.Nested(PersonalDataSchema, required=True)
    identities = fields.List(fields.Nested(IdentitySchema), required=True)
    orders = fields.List(fields.Nested(OrderSchema), required=True)


@blueprint.route("/<user:user_id>/personal-data")
@blueprint.response(200, MaskedPersonalDataSchema)
def get_personal_data(user_id: str) -> User:
    """查看个人信息（已脱敏） | Read personal data, masked

    完整的内容见 `…/personal-data/full`。

    `…/personal-data/full` shows it in full.
    """
    return load_user(user_id)


@blueprint.route("/<user:user_id>/personal-data", methods=["PUT"])
@blueprint.arguments(PersonalDataChangeSchema)
@blueprint.response(200, MaskedPersonalDataSchema)
def update_personal_data(body: dict[str, Any], user_id: str) -> User:
    """修改个人信息 | Change personal data

    未给出的字段保持不变，null 表示删除。手机号只能来自微信。

    Missing fields stay as they are, null erases. A phone number comes from WeChat alone.
    """
    user = load_user(user_id)
    for name, value in body.items():
        setattr(user, name, value)
    database.after_commit(partial(audit, "personal data changed", user.id))
    return user


@blueprint.route("/<user:user_id>/personal-data/full")
@blueprint.response(200, FullPersonalDataSchema)
def get_full_personal_data(user_id: str) -> User:
    """查看完整的个人信息 | Read personal data in full

    每次查看都会记入日志。

    Each read is logged.
    """
    user = load_user(user_id)
    audit("personal data read in full", user.id)
    return user


@blueprint.route("/me/export")
@blueprint.response(200, ExportSchema, etag=False)
def export_personal_data() -> Response:
    """导出关于自己的全部数据 | Export everything that is stored about you

    完整数据，每次导出都会记入日志。列表分段读取和发送：每个订单是某一时刻的样子，
    导出期间新增或修改的内容可能缺失。中断的响应不是合法的 JSON。

    Unmasked; each export is logged. The lists are read and sent in parts: each order is shown as it was at one moment,
    and what is added or changed during the export may be missing. A response that breaks off is not valid JSON.
    """
    with room(EXPORT_WEIGHT):
        user = load_user("me")
        data = {"user": user, "unionid": user.unionid, "personal_data": user}
        head = envelope(Code.SUCCESS, ExportSchema(only=data.keys()).dump(data)).decode()
    parts = _parts(user.id, head)
    # In the context of this request, which has ended by then: with its app, and its trace id in log lines.
    return Response(iter(partial(context_for(math.inf).run, _read, parts, None), None), content_type="application/json")


def _parts(user_id: int, head: str) -> Iterator[str]:
    """Make the export in parts, between which it holds no connection, however slow the client is."""
    audit("user exported", user_id)
    try:
        yield head.removesuffix("}}")
        for owned in [owned for owned in ownership.OWNED if owned.export]:
            yield f', "{owned.export}": ['
            schema, separator = ExportSchema(only=[owned.export]), ""
            for rows in ownership.read_all(owned, user_id):  # each batch without its brackets, as the list goes on
                yield separator + msgspec.json.encode(schema.dump({owned.export: rows})[owned.export]).decode()[1:-1]
                separator = ","
            yield "]"
        yield "}}"
    except Exception:
        current_app.logger.exception("an export broke off")
        raise
