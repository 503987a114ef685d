"""Orders and their items: amounts in fen, totals by the server, a table of what may follow which status."""

from collections.abc import Mapping
from typing import Any

from flask import g, url_for
from marshmallow import Schema, fields, validate
from sqlalchemy.orm import joinedload

from blueprints.api import MAXIMUM_ID, Blueprint, ListSchema, page_schema, require_match
from blueprints.users import get_user
from errors import ApiError, Code
from storage import database, pagination
from storage.models import Order, OrderItem

MAXIMUM_ITEMS = 100
COUNT_LIMIT = 10_000
"""How far the orders of all users are counted."""

NEXT: Mapping[str, frozenset[str]] = {
    "pending": frozenset({"paid", "cancelled"}),
    "paid": frozenset({"shipped", "cancelled"}),
    "shipped": frozenset({"completed"}),
    "completed": frozenset(),
    "cancelled": frozenset(),
}
"""Which status may follow which."""

TEXT = validate.Regexp(r"^[^\x00]*$", error="Not text.")

blueprint = Blueprint("orders", __name__, description="订单 Orders")


class ItemSchema(Schema):
    id = fields.Integer(dump_only=True, required=True)
    sku = fields.String(required=True, validate=[validate.Length(1, 64), TEXT])
    name = fields.String(required=True, validate=[validate.Length(1, 128), TEXT])
    quantity = fields.Integer(required=True, strict=True, validate=validate.Range(1, 9999))
    unit_price = fields.Integer(
        required=True, strict=True, validate=validate.Range(0, 10**9), metadata={"description": "Fen."}
    )
    subtotal = fields.Integer(dump_only=True, required=True, metadata={"description": "Fen."})


class ItemChangeSchema(ItemSchema):
    """Those that are missing stay as they are."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, partial=True)


class OrderSchema(Schema):
    id = fields.Integer(dump_only=True, required=True)
    user_id = fields.Integer(
        dump_only=True, required=True, allow_none=True, metadata={"description": "null once the user is gone."}
    )
    status = fields.String(dump_only=True, required=True, metadata={"enum": list(NEXT)})
    remark = fields.String(load_default=None, allow_none=True, validate=[validate.Length(max=500), TEXT])
    total = fields.Integer(dump_only=True, required=True, metadata={"description": "Fen."})
    items = fields.List(fields.Nested(ItemSchema), required=True, validate=validate.Length(1, MAXIMUM_ITEMS))
    created_at = fields.DateTime(dump_only=True, required=True)
    updated_at = fields.DateTime(dump_only=True, required=True)


class OrderChangeSchema(Schema):
    remark = fields.String(allow_none=True, validate=[validate.Length(max=500), TEXT])
    status = fields.String(validate=validate.OneOf(list(NEXT)))


class OrderListSchema(ListSchema):
    user_id = fields.Integer(validate=validate.Range(1, MAXIMUM_ID), metadata={"description": "For administrators."})
    status = fields.String(validate=validate.OneOf(list(NEXT)))


@blueprint.route("")
@blueprint.arguments(OrderListSchema, location="query")
@blueprint.response(200, page_schema(OrderSchema))
@blueprint.fails(Code.INVALID_INPUT)
def list_orders(query: dict[str, Any]) -> dict[str, Any]:
    """List your orders; an administrator lists those of all

    The total of one user's orders is exact; those of all are counted up to 10,000.
    """
    me = get_user(g.user_id)
    wanted = {name: query.pop(name) for name in ("user_id", "status") if name in query}
    if me.role != "admin":
        if wanted.get("user_id", me.id) != me.id:
            raise ApiError(Code.NOT_FOUND)
        wanted["user_id"] = me.id
    return pagination.page_of(
        Order,
        [getattr(Order, name) == value for name, value in wanted.items()],
        count_limit=None if "user_id" in wanted else COUNT_LIMIT,
        **query,
    )


@blueprint.route("", methods=["POST"])
@blueprint.arguments(OrderSchema)
@blueprint.response(201, OrderSchema)
def create_order(body: dict[str, Any]) -> tuple[Order, dict[str, str]]:
    """Order something"""
    order = Order(
        user_id=get_user(g.user_id).id,
        remark=body["remark"],
        items=[OrderItem(**item) for item in body["items"]],
    )
    order.sum_up()
    database.session.add(order)
    database.session.flush()
    return order, {"Location": url_for("orders.get_order", order_id=order.id)}


@blueprint.route("/<id:order_id>")
@blueprint.response(200, OrderSchema)
@blueprint.fails(Code.NOT_FOUND)
def get_order(order_id: int) -> Order:
    """Read an order"""
    return find_order(order_id)


@blueprint.route("/<id:order_id>", methods=["PUT"])
@blueprint.arguments(OrderChangeSchema)
@blueprint.response(200, OrderSchema)
@blueprint.fails(Code.NOT_FOUND, Code.CONFLICT)
def put_order(body: dict[str, Any], order_id: int) -> Order:
    """Change the remark, or the status to one that may follow

    pending: paid, cancelled; paid: shipped, cancelled; shipped: completed.
    """
    order = find_order(order_id)
    require_match(order)
    status = body.get("status", order.status)
    if status != order.status and status not in NEXT[order.status]:
        allowed = ", ".join(sorted(NEXT[order.status])) or "nothing"
        raise ApiError(Code.CONFLICT, errors={"status": [f"After {order.status} may come: {allowed}."]})
    if status == "paid" and not order.items:
        raise ApiError(Code.CONFLICT, errors={"items": ["Nothing is ordered."]})
    order.status = status
    order.remark = body.get("remark", order.remark)
    return order


@blueprint.route("/<id:order_id>", methods=["DELETE"])
@blueprint.response(200)
@blueprint.fails(Code.NOT_FOUND, Code.CONFLICT)
def delete_order(order_id: int) -> None:
    """Delete an order that is pending; any other is part of the books"""
    order = find_order(order_id)
    require_match(order)
    require_pending(order)
    database.session.delete(order)


@blueprint.route("/<id:order_id>/items")
@blueprint.arguments(ListSchema(only=["page", "page_size"]), location="query")
@blueprint.response(200, page_schema(ItemSchema))
@blueprint.fails(Code.NOT_FOUND, Code.INVALID_INPUT)
def list_items(query: dict[str, Any], order_id: int) -> dict[str, Any]:
    """List what was ordered"""
    items = find_order(order_id).items
    first = (query["page"] - 1) * query["page_size"]
    return {"items": items[first : first + query["page_size"]], **query, "total": len(items)}


@blueprint.route("/<id:order_id>/items", methods=["POST"])
@blueprint.arguments(ItemSchema)
@blueprint.response(201, ItemSchema)
@blueprint.fails(Code.NOT_FOUND, Code.CONFLICT)
def create_item(body: dict[str, Any], order_id: int) -> tuple[OrderItem, dict[str, str]]:
    """Add to an order that is pending"""
    order = find_order(order_id, lock=True)
    require_pending(order)
    if len(order.items) >= MAXIMUM_ITEMS:
        raise ApiError(Code.CONFLICT, errors={"items": [f"{MAXIMUM_ITEMS} at the most."]})
    item = OrderItem(**body)
    order.items.append(item)
    order.sum_up()
    database.session.flush()
    return item, {"Location": url_for("orders.get_item", order_id=order.id, item_id=item.id)}


@blueprint.route("/<id:order_id>/items/<id:item_id>")
@blueprint.response(200, ItemSchema)
@blueprint.fails(Code.NOT_FOUND)
def get_item(order_id: int, item_id: int) -> OrderItem:
    """Read a line of an order"""
    return find_item(find_order(order_id), item_id)


@blueprint.route("/<id:order_id>/items/<id:item_id>", methods=["PUT"])
@blueprint.arguments(ItemChangeSchema)
@blueprint.response(200, ItemSchema)
@blueprint.fails(Code.NOT_FOUND, Code.CONFLICT)
def put_item(body: dict[str, Any], order_id: int, item_id: int) -> OrderItem:
    """Change a line of an order that is pending"""
    order = find_order(order_id)
    item = find_item(order, item_id)
    require_match(order)
    require_pending(order)
    for name, value in body.items():
        setattr(item, name, value)
    order.sum_up()
    return item


@blueprint.route("/<id:order_id>/items/<id:item_id>", methods=["DELETE"])
@blueprint.response(200)
@blueprint.fails(Code.NOT_FOUND, Code.CONFLICT)
def delete_item(order_id: int, item_id: int) -> None:
    """Take a line from an order that is pending"""
    order = find_order(order_id)
    item = find_item(order, item_id)
    require_match(order)
    require_pending(order)
    order.items.remove(item)
    order.sum_up()


def find_order(order_id: int, *, lock: bool = False) -> Order:
    """Load an order that the caller may see.

    :param lock: whether to keep others from changing it until the transaction ends.
    :raises ApiError: NOT_FOUND also for that of somebody else, so that numbers tell nothing.
    """
    me = get_user(g.user_id)
    # With its items in one statement: in a second one they might be those of the next version.
    together = [joinedload(Order.items)]
    order = database.session.get(Order, order_id, options=together, with_for_update=lock or None)
    if order is None or (order.user_id != me.id and me.role != "admin"):
        raise ApiError(Code.NOT_FOUND)
    return order


def require_pending(order: Order) -> None:
    """Make sure that an order's items may still change.

    :raises ApiError: CONFLICT if not.
    """
    if order.status != "pending":
        raise ApiError(Code.CONFLICT, errors={"status": ["Only while it is pending."]})


def find_item(order: Order, item_id: int) -> OrderItem:
    """Find a line of an order.

    :raises ApiError: NOT_FOUND if the order has no such line.
    """
    item = next((item for item in order.items if item.id == item_id), None)
    if item is None:
        raise ApiError(Code.NOT_FOUND)
    return item
