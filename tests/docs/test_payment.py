"""docs/*/payment.md, followed in a copy of the repository: signed callbacks of WeChat Pay make orders paid."""

import base64
import json
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.docs.pages import blocks, page
from tests.harness import APP_ID, ROOT, WAIT_SECONDS, Service, Simulator, wait_until

KEY = "0123456789abcdefghijklmnopqrstuv"
ITEM = {"sku": "tea-50", "name": "龙井 50g", "quantity": 2, "unit_price": 12800}


class Bank:
    """WeChat Pay: sends what the users have paid."""

    def __init__(self) -> None:
        self.private_key = rsa.generate_private_key(65537, 2048)
        public = self.private_key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        self.settings = {"WECHAT_PAY_API_V3_KEY": KEY, "WECHAT_PAY_PUBLIC_KEY": base64.b64encode(public).decode()}
        self.url = ""

    def pays(self, order_id: int, total: int, *, age: int = 0, key: str = KEY, **different: str) -> requests.Response:
        payment = {"appid": APP_ID, "trade_state": "SUCCESS", "out_trade_no": f"order-{order_id}", **different}
        text = json.dumps(payment | {"amount": {"total": total, "currency": "CNY"}}).encode()
        nonce = secrets.token_hex(6)
        sealed = base64.b64encode(AESGCM(key.encode()).encrypt(nonce.encode(), text, b"transaction")).decode()
        resource = {"algorithm": "AEAD_AES_256_GCM", "ciphertext": sealed, "nonce": nonce}
        resource["associated_data"] = "transaction"
        body = json.dumps({"id": "EV-1", "event_type": "TRANSACTION.SUCCESS", "resource": resource}).encode()
        return self.sends(body, int(time.time()) - age)

    def sends(self, body: bytes, timestamp: int, sent: bytes | None = None) -> requests.Response:
        nonce = secrets.token_hex(16)
        signed = f"{timestamp}\n{nonce}\n".encode() + body + b"\n"
        signature = base64.b64encode(self.private_key.sign(signed, padding.PKCS1v15(), SHA256())).decode()
        headers = {"Content-Type": "application/json", "Wechatpay-Timestamp": str(timestamp)}
        headers |= {"Wechatpay-Nonce": nonce, "Wechatpay-Signature": signature}
        return requests.post(self.url, data=sent or body, headers=headers, timeout=WAIT_SECONDS)


class Shop:
    """The service, a buyer, and an administrator."""

    def __init__(self, service: Service, simulator: Simulator) -> None:
        self.service = service
        self.buyer = service.log_in(simulator, openid="o-buyer")
        self.administrator = service.log_in(simulator, openid="o-administrator")

    def order(self) -> int:
        created = self.service.call("POST", "/orders", self.buyer, json={"items": [ITEM]})
        assert created.status_code == 201, created.text
        return created.json()["data"]["id"]

    def status(self, order_id: int) -> str:
        return self.service.call("GET", f"/orders/{order_id}", self.buyer).json()["data"]["status"]

    def change(self, order_id: int, token: str, status: str) -> int:
        version = self.service.call("GET", f"/orders/{order_id}", token).json()["data"]["version"]
        url, headers = f"{self.service.url}/api/v1/orders/{order_id}", {"Authorization": f"Bearer {token}"}
        headers["If-Match"] = f'"{version}"'
        return requests.put(url, json={"status": status}, headers=headers, timeout=WAIT_SECONDS).status_code


def insert_after(path: Path, start: str, text: str) -> None:
    """Put text after the only line that starts so."""
    lines = path.read_text().splitlines(keepends=True)
    (number,) = [number for number, line in enumerate(lines) if line.startswith(start)]
    path.write_text("".join([*lines[: number + 1], text, *lines[number + 1 :]]))


def follow_the_page(language: str, tree: Path) -> None:
    code, mounted, imported, declared = [block.text for block in blocks(page(language, "payment.md"))[:4]]
    (tree / "blueprints" / "payments.py").write_text(code)
    insert_after(tree / "blueprints" / "__init__.py", "    mount(messages.blueprint", mounted)
    insert_after(tree / "blueprints" / "__init__.py", "from flask_cors import", imported)
    insert_after(tree / "settings.py", "    WECHAT_PUSH_AES_KEY = ", declared)


def errors(service: Service) -> list[dict[str, Any]]:
    return [line for line in service.log_lines() if line["level"] == "ERROR"]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    tree = tmp_path / "tree"
    ignored = shutil.ignore_patterns(".*", "var", "dist", "tests", "bench", "clients", "docs", "__pycache__")
    shutil.copytree(ROOT, tree, ignore=ignored)
    follow_the_page("zh", tree)
    return tree


def test_the_code_has_the_style_of_the_repository(tree: Path) -> None:
    words = [sys.executable, "-m", "ruff", "--config", str(ROOT / "pyproject.toml"), "--no-cache"]
    for check in (["check", "--ignore", "I001"], ["format", "--check"]):  # the import has a line of its own
        command = [*words[:3], check[0], *words[3:], *check[1:], "blueprints", "settings.py"]
        done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_callback_is_in_the_documents(tree: Path) -> None:
    subprocess.run([sys.executable, "-m", "dev.openapi"], cwd=tree, check=True)
    operation = json.loads((tree / "openapi.json").read_text())["paths"]["/api/v1/payments"]["post"]
    assert (operation["operationId"], operation["summary"]) == ("receivePayment", "支付回调")
    assert {"200", "400", "404", "409"} <= operation["responses"].keys()


def test_a_payment_makes_its_order_paid(
    tree: Path, start_service: Callable[..., Service], simulator: Simulator
) -> None:
    bank = Bank()
    service = start_service(within=("env", "-C", str(tree)), ADMIN_OPENIDS="o-administrator", **bank.settings)
    bank.url = f"{service.url}/api/v1/payments"
    shop = Shop(service, simulator)

    order_id = shop.order()
    assert shop.change(order_id, shop.buyer, "paid") == 403
    for wrong in ({"age": 301}, {"age": -301}, {"key": KEY[::-1]}, {"appid": "wxfedcba9876543210"}):
        refused = bank.pays(order_id, 25600, **wrong)
        assert (refused.status_code, refused.json()["code"]) == (400, 464), wrong
    now = int(time.time())
    for body, sent in ((b"{}", b'{"id": 1}'), (b"{}", None), (b"[", None)):
        assert bank.sends(body, now, sent).json()["code"] == 464
    assert requests.post(bank.url, json={}, timeout=WAIT_SECONDS).json()["code"] == 464
    assert bank.pays(order_id, 25600, trade_state="CLOSED").status_code == 200
    assert shop.status(order_id) == "pending"

    for _ in range(2):
        assert bank.pays(order_id, 25600).json() == {"code": 200, "message": "操作成功", "data": {}}
        assert shop.status(order_id) == "paid"
    assert shop.change(order_id, shop.administrator, "shipped") == 200
    assert bank.pays(order_id, 25600).status_code == 200
    assert shop.status(order_id) == "shipped"

    changed, cancelled = shop.order(), shop.order()
    assert bank.pays(changed, 1).status_code == 409
    assert shop.status(changed) == "pending"
    assert shop.change(cancelled, shop.buyer, "cancelled") == 200
    assert bank.pays(cancelled, 25600).status_code == 409
    assert shop.status(cancelled) == "cancelled"
    assert bank.pays(10**6, 25600).status_code == 404
    wait_until(lambda: len(errors(service)) == 3)
    assert {line["message"] for line in errors(service)} == {"a payment does not fit its order: refund it"}
