"""Orders: amounts in fen, totals by the server, a table of status transitions. The model for a new resource.

Items change only while their order is pending; they share its version.

A shop puts its price list into `price_of`; a payment's callback calls `set_status`.
"""

from typing import Any

from flask import request
from marshmallow import Schema, fields, validate
from sqlalchemy.orm import joinedload

from blueprints.api import TIME, VERSION, Blueprint, require_match
from blueprints.lists import ListSchema, load_page, page_schema
from blueprints.parsing import MAXIMUM_ID, MAXIMUM_LENGTH
from blueprints.policies import current_user
from errors import ApiError, Code, Message, conflict
from storage import database, sessions
from storage.models import Order, OrderItem

STATUS_TRANSITIONS: dict[str, tuple[str, ...]] = {
    "pending": ("paid", "cancelled"),
    "paid": ("shipped", "cancelled"),
    "shipped": ("completed",),
    "completed": (),
    "cancelled": (),
}

OWNER_STATUSES = ("pending", "cancelled", "completed")
"""What the buyer may set, as far as the table allows; an administrator or the service itself sets the others."""

NOT_THE_BUYERS = Message("此状态由管理员或支付回调设定", "This status is set by an administrator or the payment")
NO_NUL = validate.Regexp(r"^[^\x00]*$", error="Must not contain NUL.")
REMARK_RULES = [validate.Length(max=500), NO_NUL]
PRICE_RULE = validate.Range(0, 10**9)
STATUSES = list(STATUS_TRANSITIONS)

blueprint = Blueprint("orders", __name__, title=Message("订单", "Orders"))


class ItemSchema(Schema):
    id = fields.Integer(dump_only=True, required=True, metadata={"example": 1})
    sku = fields.String(required=True, validate=[validate.Length(1, 64), NO_NUL], metadata={"example": "tea-1"})
    name = fields.String(required=True, validate=[validate.Length(1, 128), NO_NUL], metadata={"example": "龙井茶"})
    quantity = fields.Integer(required=True, strict=True, validate=validate.Range(1, 9999), metadata={"example": 2})
    unit_price = fields.Integer(required=True, strict=True, validate=PRICE_RULE, metadata={"example": 1250})
    """单位：分 | In fen"""
    subtotal = fields.Integer(dump_only=True, required=True, metadata={"example": 2500})
    """单位：分 | In fen"""


ShownItemSchema = ItemSchema.from_dict({"version": VERSION}, name="ShownItemSchema")
"""An item on its own; within an order, the order shows the version."""
ItemChangeSchema = ItemSchema.from_dict({}, name="ItemChangeSchema")
"""Of a name of its own, as apispec would call a partial ItemSchema `Item1`."""


class OrderSchema(Schema):
    MAXIMUM_BYTES = 128 * 1024  # 100 items in Chinese, escaped

    id = fields.Integer(dump_only=True, required=True, metadata={"example": 1})
    user_id = fields.Integer(dump_only=True, required=True, allow_none=True, metadata={"example": 1})
    """用户已注销时为 null | null if the user has been deleted"""
    status = fields.String(dump_only=True, required=True, metadata={"enum": STATUSES, "example": "pending"})
    remark = fields.String(load_default=None, allow_none=True, validate=REMARK_RULES, metadata={"example": "少糖"})
    total = fields.Integer(dump_only=True, required=True, metadata={"example": 2500})
    """单位：分 | In fen"""
    items = fields.List(fields.Nested(ItemSchema), required=True, validate=validate.Length(1, MAXIMUM_LENGTH))
    created_at = fields.DateTime(dump_only=True, required=True, metadata=TIME)
    updated_at = fields.DateTime(dump_only=True, required=True, metadata=TIME)
    version = VERSION


class OrderSummarySchema(OrderSchema):
    class Meta:
        exclude = ("items",)


class OrderChangeSchema(Schema):
    remark = fields.String(allow_none=True, validate=REMARK_RULES, metadata={"example": "少糖，放门口"})
    status = fields.String(validate=validate.OneOf(STATUSES), metadata={"example": "cancelled"})
    """可变为：pending → paid, cancelled；paid → shipped, cancelled；shipped → completed |
    What may follow: pending → paid, cancelled; paid → shipped, cancelled; shipped → completed"""


class OrderListSchema(ListSchema):
    user_id = fields.Integer(validate=validate.Range(1, MAXIMUM_ID), metadata={"example": 1})
    """仅限管理员 | For administrators"""
    status = fields.String(validate=validate.OneOf(STATUSES), metadata={"example": "pending"})


@blueprint.route("")
@blueprint.arguments(OrderListSchema, location="query")
@blueprint.response(200, page_schema(OrderSummarySchema))
@blueprint.fails(Code.NOT_FOUND)
def list_orders(query: dict[str, Any]) -> dict[str, Any]:
    """列出自己的订单 | List your orders

    不含明细，明细见 `GET /orders/{order_id}`。管理员可列出所有用户的订单。`total` 最多为 10,000。

    Without their items, which `GET /orders/{order_id}` shows. An administrator lists those of all users. `total`
    is at most 10,000.
    """
    me = current_user()
    if me.role != "admin" and query.setdefault("user_id", me.id) != me.id:
        raise ApiError(Code.NOT_FOUND)
    filters = [getattr(Order, name) == query.pop(name) for name in ("user_id", "status") if name in query]
    return load_page(Order, *filters, **query)


@blueprint.route("", methods=["POST"])
@blueprint.arguments(OrderSchema)
@blueprint.response(201, OrderSchema)
def create_order(body: dict[str, Any]) -> Order:
    """创建订单 | Create an order

    总额由服务端计算。

    The service computes the total.
    """
    items = [fill_item(OrderItem(), item) for item in body["items"]]
    order = Order(user_id=current_user().id, remark=body["remark"], items=items)
    order.sum_up()
    database.session.add(order)
    return order


@blueprint.route("/<id:order_id>")
@blueprint.response(200, OrderSchema)
def get_order(order_id: int) -> Order:
    """查看订单 | Read an order

    含明细。别人的订单是 404。

    With its items. Another user's order is a 404.
    """
    return load_order(order_id)


@blueprint.route("/<id:order_id>", methods=["PUT"])
@blueprint.arguments(OrderChangeSchema)
@blueprint.response(200, OrderSchema, example={"remark": "少糖，放门口", "status": "cancelled", "version": 2})
@blueprint.fails(FORBIDDEN=NOT_THE_BUYERS)
def update_order(body: dict[str, Any], order_id: int) -> Order:
    """修改订单的备注或状态 | Change the remark or the status of an order

    未给出的字段保持不变。买家可以取消 `pending` 或 `paid` 订单，并完成 `shipped` 订单；其他状态由管理员或支付回调设定。

    Missing fields stay as they are. The buyer may cancel a `pending` or `paid` order and complete a `shipped` one; the
    other statuses are set by an administrator or by the payment.
    """
    order = load_order(order_id)
    status = body.get("status", order.status)
    if status not in (order.status, *OWNER_STATUSES) and current_user().role != "admin":
        raise ApiError(Code.FORBIDDEN, message=NOT_THE_BUYERS)
    _change_status(order, status)
    order.remark = body.get("remark", order.remark)
    return order


@blueprint.route("/<id:order_id>", methods=["DELETE"])
@blueprint.response(200)
def delete_order(order_id: int) -> None:
    """删除 pending 订单 | Delete a pending order

    其他状态的订单为账目保留，返回 409。

    Other orders are kept for accounting: 409.
    """
    database.session.delete(load_order(order_id, pending=True))


@blueprint.route("/<id:order_id>/items")
@blueprint.arguments(ListSchema(only=["page", "page_size"]), location="query")
@blueprint.response(200, page_schema(ShownItemSchema))
def list_order_items(query: dict[str, Any], order_id: int) -> dict[str, Any]:
    """列出订单的明细 | List the items of an order

    按添加的先后排列。

    In the order in which they were added.
    """
    items = load_order(order_id).items
    first = (query["page"] - 1) * query["page_size"]
    return {"items": items[first : first + query["page_size"]], **query, "total": len(items)}


@blueprint.route("/<id:order_id>/items", methods=["POST"])
@blueprint.arguments(ItemSchema)
@blueprint.response(201, ShownItemSchema, example={"id": 2, "version": 2})
def create_order_item(body: dict[str, Any], order_id: int) -> OrderItem:
    """为 pending 订单添加明细 | Add an item to a pending order

    订单的总额与版本随之改变。

    The order's total and version change with it.
    """
    order = load_order(order_id, pending=True)
    if len(order.items) >= MAXIMUM_LENGTH:
        raise conflict("items", Message(f"最多 {MAXIMUM_LENGTH} 件商品", f"At most {MAXIMUM_LENGTH} items"))
    item = fill_item(OrderItem(), body)
    order.items.append(item)
    order.sum_up()
    return item


@blueprint.route("/<id:order_id>/items/<id:item_id>")
@blueprint.response(200, ShownItemSchema)
def get_order_item(order_id: int, item_id: int) -> OrderItem:
    """查看订单的一项明细 | Read an item of an order

    其 `version` 是订单的版本。

    Its `version` is that of the order.
    """
    return load_item(order_id, item_id)


@blueprint.route("/<id:order_id>/items/<id:item_id>", methods=["PUT"])
@blueprint.arguments(ItemChangeSchema(partial=True), example={"quantity": 3})  # missing fields stay as they are
@blueprint.response(200, ShownItemSchema, example={"quantity": 3, "subtotal": 3750, "version": 2})
def update_order_item(body: dict[str, Any], order_id: int, item_id: int) -> OrderItem:
    """修改 pending 订单的明细 | Change an item of a pending order

    未给出的字段保持不变。

    Missing fields stay as they are.
    """
    item = fill_item(load_item(order_id, item_id, pending=True), body)
    item.order.sum_up()
    return item


@blueprint.route("/<id:order_id>/items/<id:item_id>", methods=["DELETE"])
@blueprint.response(200)
def delete_order_item(order_id: int, item_id: int) -> None:
    """删除 pending 订单的一项明细 | Remove an item from a pending order

    最后一项不能删除，返回 409：请改为删除订单。

    The last item cannot be removed (409): delete the order instead.
    """
    item = load_item(order_id, item_id, pending=True)
    order = item.order
    if len(order.items) == 1:
        reason = Message("订单至少要有一项明细：请改为删除订单", "An order needs an item: delete the order instead")
        raise conflict("items", reason)
    order.items.remove(item)
    order.sum_up()


def set_status(order_id: int, status: str, *, total: int | None = None) -> None:
    """Set a status for the service itself, as the callback of a payment does; again the same one changes nothing.

    In a transaction of its own: the view of the callback has `transaction=False`.

    :param total: what was paid, in fen: a pending order may have changed since.
    :raises ApiError: NOT_FOUND; CONFLICT if the status cannot follow the current one, or the total is another.
    """

    def change() -> None:
        if (order := database.lock(Order, order_id)) is None:
            raise ApiError(Code.NOT_FOUND)
        if total not in (None, order.total):
            raise conflict("total", Message(f"订单总额为 {order.total}", f"The order's total is {order.total}"))
        _change_status(order, status)

    database.in_transaction(change)


def _change_status(order: Order, status: str) -> None:
    if status not in (order.status, *STATUS_TRANSITIONS[order.status]):
        old, new = order.status, ", ".join(STATUS_TRANSITIONS[order.status])
        reason = Message(f"{old} 订单只能变为：{new or '无'}", f"A {old} order can become: {new or 'nothing else'}")
        raise conflict("status", reason)
    order.status = status


def price_of(item: dict[str, Any]) -> int:
    """Return the unit price of an item in fen: the caller's, until a shop's price list stands here.

    Called for each item that enters an order or changes.

    :param item: `sku`, `name`, `quantity` and `unit_price`, all valid.
    """
    return int(item["unit_price"])


def fill_item(item: OrderItem, body: dict[str, Any]) -> OrderItem:
    """Set what a request says about an item, and its price; returns the item."""
    for name, value in body.items():
        setattr(item, name, value)
    item.unit_price = price_of({name: getattr(item, name) for name in ("sku", "name", "quantity", "unit_price")})
    return item


def load_order(order_id: int, item_id: int | None = None, *, pending: bool = False) -> Order:
    """Load an order that the caller may see; for a change locked, so that nobody else's outrun it.

    A PUT or DELETE must name its version in If-Match.

    :param item_id: an item that it must have.
    :param pending: whether it must be pending, as for a change of its items.
    :raises ApiError: NOT_FOUND also for another user's order, so that ids reveal nothing; CONFLICT if not pending;
        as `require_match` does.
    """
    me = current_user()
    lock = request.method not in sessions.SAFE_METHODS or None
    # With its items in one statement: a second one might read those of the next version.
    order = database.session.get(Order, order_id, options=[joinedload(Order.items)], with_for_update=lock)
    if order is None or (order.user_id != me.id and me.role != "admin"):
        raise ApiError(Code.NOT_FOUND)
    if item_id not in (None, *(item.id for item in order.items)):
        raise ApiError(Code.NOT_FOUND)
    if pending and order.status != "pending":
        english = "Only a pending order can be deleted or its items changed"
        raise conflict("status", Message("只有 pending 订单可以删除或更改明细", english))
    if request.method in ("PUT", "DELETE"):
        require_match(order)
    return order


def load_item(order_id: int, item_id: int, *, pending: bool = False) -> OrderItem:
    """Load an item of an order, with the order.

    :raises ApiError: what `load_order` does.
    """
    return next(item for item in load_order(order_id, item_id, pending=pending).items if item.id == item_id)
