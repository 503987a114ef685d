"""The API's documents: /openapi.json for programs, /docs for people. flask-smorest makes both from the code."""

from flask import Blueprint

from errors import Code

_DESCRIPTION = (
    "微信小程序后端 A backend for WeChat mini-programs. Every JSON response is `{code, message, data}` and carries "
    "`X-Trace-Id`; `message` is Chinese, or English where `Accept-Language` prefers it.\n\n"
    "| code | HTTP | 中文 | English |\n|---|---|---|---|\n"
) + "\n".join(f"| {code.number} | {code.status} | {code.message.chinese} | {code.message.english} |" for code in Code)

_COOKIE = "For browsers; over plain HTTP named `session`. A write by cookie must come from a page of this site."
_SECURITY_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "The token that login gave."},
    "cookie": {"type": "apiKey", "in": "cookie", "name": "__Host-session", "description": _COOKIE},
    "metrics": {"type": "http", "scheme": "bearer", "description": "METRICS_TOKEN, for Prometheus."},
}

CONFIG = {
    "API_TITLE": "快上 Kuaishang",
    "OPENAPI_VERSION": "3.1.0",
    "OPENAPI_URL_PREFIX": "/",
    "OPENAPI_SWAGGER_UI_PATH": "docs",
    "OPENAPI_SWAGGER_UI_URL": "/docs/assets/",
    "API_SPEC_OPTIONS": {"info": {"description": _DESCRIPTION}, "components": {"securitySchemes": _SECURITY_SCHEMES}},
}

# flask-swagger-ui carries Swagger UI's files, so the page works without the internet.
assets = Blueprint("docs", "flask_swagger_ui", static_folder="dist", static_url_path="/docs/assets")
