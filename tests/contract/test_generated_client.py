"""A client that openapi-python-client generates from the document, its functions and models alone, works as it is."""

import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import ModuleType

import pytest

from tests.harness import ROOT, WAIT_SECONDS, Service, Simulator

DOCUMENT = ROOT / "openapi.en.json"
PACKAGE = "generated_client"


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], ModuleType]]:
    """Import modules of the generated package, by their names within it."""
    folder = tmp_path_factory.mktemp("generated")
    config = folder / "config.yml"
    # Nobody reads it, so it need not be formatted; and the generator knows no XML, which WeChat alone sends.
    config.write_text("post_hooks: []\ncontent_type_overrides: {text/xml: application/octet-stream}\n")
    command = [sys.executable, "-m", "openapi_python_client", "generate", "--path", str(DOCUMENT), "--meta", "none"]
    command += ["--config", str(config), "--output-path", str(folder / PACKAGE), "--fail-on-warning"]
    done = subprocess.run(command, cwd=folder, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    sys.path.insert(0, str(folder))
    yield lambda name: importlib.import_module(f"{PACKAGE}.{name}")
    sys.path.remove(str(folder))
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        del sys.modules[name]


@pytest.fixture
def connections() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_it_logs_in_orders_pages_and_meets_a_412(
    generated: Callable[[str], ModuleType],
    services: tuple[Service, Service],
    simulator: Simulator,
    connections: ExitStack,
) -> None:
    log_in = generated("api.login.log_in")
    create_order, list_orders, get_order, update_order = (
        generated(f"api.orders.{name}") for name in ("create_order", "list_orders", "get_order", "update_order")
    )
    client, models, unset = generated("client"), generated("models"), generated("types").UNSET
    service, _ = services
    # Whatever the document does not name is an exception.
    options = {"base_url": service.url, "timeout": WAIT_SECONDS, "raise_on_unexpected_status": True}

    stranger = connections.enter_context(client.Client(**options))
    refused = log_in.sync(client=stranger, body=models.WechatCode(code="nobody-gave-this"))
    assert isinstance(refused, models.ErrorEnvelope)
    assert refused.code == 460
    login = log_in.sync(client=stranger, body=models.WechatCode(code=simulator.code(openid="o-generated")))
    assert isinstance(login, models.LoginEnvelope)
    service.tokens.append(login.data.token)
    user = connections.enter_context(client.AuthenticatedClient(token=login.data.token, **options))

    made = []
    for number in range(1, 6):
        item = models.ItemInput(sku=f"S-{number}", name="Tea", quantity=number, unit_price=250)
        body = models.OrderInput(items=[item], remark=f"Number {number}")
        order = create_order.sync(client=user, body=body, idempotency_key=f"generated-{number}")
        assert isinstance(order, models.OrderEnvelope)
        assert (order.data.total, order.data.items[0].subtotal) == (number * 250, number * 250)
        made.append(order.data)
    repeated = create_order.sync(client=user, body=body, idempotency_key="generated-5")
    assert repeated.data == made[-1]

    for next_page in (
        lambda number, _: {"page": number},
        lambda _, last: {"after": last.id if last else unset},
    ):
        found, number = [], 1
        while True:
            last = found[-1] if found else None
            page = list_orders.sync(client=user, page_size=2, **next_page(number, last))
            assert isinstance(page, models.OrderSummaryPageEnvelope)
            if not page.data.items:
                break
            found += page.data.items
            number += 1
        assert [order.id for order in found] == [order.id for order in reversed(made)]
        assert number == 4

    order = made[0]
    changed = update_order.sync_detailed(
        order.id, client=user, body=models.OrderChange(remark="Less sugar"), if_match=f'"{order.version}"'
    )
    assert isinstance(changed.parsed, models.OrderEnvelope)
    assert changed.headers["ETag"]
    too_late = update_order.sync_detailed(
        order.id, client=user, body=models.OrderChange(remark="More"), if_match=f'"{order.version}"'
    )
    assert isinstance(too_late.parsed, models.ErrorEnvelope)
    assert (too_late.status_code, too_late.parsed.code) == (412, 412)
    now = get_order.sync(order.id, client=user)
    assert now.data.remark == "Less sugar"
    again = update_order.sync(
        order.id, client=user, body=models.OrderChange(remark="More"), if_match=f'"{now.data.version}"'
    )
    assert again.data.remark == "More"
