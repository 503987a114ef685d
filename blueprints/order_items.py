"""The items of an order, which change only while it is pending; they share its version."""

from typing import Any

from flask import url_for

from blueprints.api import Blueprint
from blueprints.lists import ListSchema, page_schema
from blueprints.orders import MAXIMUM_ITEMS, ItemSchema, fill_item, load_order
from blueprints.preconditions import VERSION, require_match
from errors import ApiError, Code, Message, conflict
from storage import database
from storage.models import OrderItem

blueprint = Blueprint("order_items", __name__, description="订单明细 Order items")


class ShownItemSchema(ItemSchema):
    """An item on its own; within an order, the order shows the version."""

    version = VERSION


class ItemChangeSchema(ItemSchema):
    """Missing fields stay as they are."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, partial=True)


@blueprint.route("/<id:order_id>/items")
@blueprint.arguments(ListSchema(only=["page", "page_size"]), location="query")
@blueprint.response(200, page_schema(ShownItemSchema))
def list_items(query: dict[str, Any], order_id: int) -> dict[str, Any]:
    """List the items of an order"""
    items = load_order(order_id).items
    first = (query["page"] - 1) * query["page_size"]
    return {"items": items[first : first + query["page_size"]], **query, "total": len(items)}


@blueprint.route("/<id:order_id>/items", methods=["POST"])
@blueprint.arguments(ItemSchema)
@blueprint.response(201, ShownItemSchema)
@blueprint.fails(Code.CONFLICT)
def create_item(body: dict[str, Any], order_id: int) -> tuple[OrderItem, dict[str, str]]:
    """Add an item to a pending order"""
    order = load_order(order_id, pending=True)
    if len(order.items) >= MAXIMUM_ITEMS:
        raise conflict("items", Message(f"最多 {MAXIMUM_ITEMS} 件商品", f"At most {MAXIMUM_ITEMS} items"))
    item = fill_item(OrderItem(), body)
    order.items.append(item)
    order.sum_up()
    database.session.flush()
    return item, {"Location": url_for("order_items.get_item", order_id=order.id, item_id=item.id)}


@blueprint.route("/<id:order_id>/items/<id:item_id>")
@blueprint.response(200, ShownItemSchema)
def get_item(order_id: int, item_id: int) -> OrderItem:
    """Read an item of an order"""
    return load_item(order_id, item_id)


@blueprint.route("/<id:order_id>/items/<id:item_id>", methods=["PUT"])
@blueprint.arguments(ItemChangeSchema)
@blueprint.response(200, ShownItemSchema)
@blueprint.fails(Code.CONFLICT)
def put_item(body: dict[str, Any], order_id: int, item_id: int) -> OrderItem:
    """Change an item of a pending order"""
    item = load_item(order_id, item_id, pending=True)
    require_match(item.order)
    fill_item(item, body)
    item.order.sum_up()
    return item


@blueprint.route("/<id:order_id>/items/<id:item_id>", methods=["DELETE"])
@blueprint.response(200)
@blueprint.fails(Code.CONFLICT)
def delete_item(order_id: int, item_id: int) -> None:
    """Remove an item from a pending order, but not the last one"""
    item = load_item(order_id, item_id, pending=True)
    order = item.order
    require_match(order)
    if len(order.items) == 1:
        reason = Message("订单至少要有一项明细：请改为删除订单", "An order needs an item: delete the order instead")
        raise conflict("items", reason)
    order.items.remove(item)
    order.sum_up()


def load_item(order_id: int, item_id: int, *, pending: bool = False) -> OrderItem:
    """Load an item of an order, with the order.

    :raises ApiError: NOT_FOUND if the order has no such item; what `load_order` does.
    """
    items = load_order(order_id, pending=pending).items
    item = next((item for item in items if item.id == item_id), None)
    if item is None:
        raise ApiError(Code.NOT_FOUND)
    return item
