"""All that is served, in order: each group of routes, where it is mounted, and who may come in."""

from flask import Flask

from blueprints import auth, docs, health, messages, metrics, orders, personal_data, users, web_login
from blueprints.api import Api

V1 = "/api/v1"


def init_app(app: Flask) -> None:
    app.config.update(docs.CONFIG, API_VERSION=app.config["VERSION"])
    app.url_map.converters["user"] = users.UserIdConverter
    api = Api(app)
    api.register_converter(users.UserIdConverter, lambda _: {"type": "string", "pattern": "^(me|[1-9][0-9]{0,17})$"})
    api.guard("api-docs", auth=auth.public)  # flask-smorest mounts that one itself
    app.register_blueprint(docs.assets)
    api.guard("docs", auth=auth.public)
    api.register_blueprint(health.blueprint, auth=auth.public)
    api.register_blueprint(metrics.blueprint, auth=auth.scrapers)
    api.register_blueprint(auth.login, url_prefix=f"{V1}/auth", auth=auth.public)
    api.register_blueprint(auth.sessions, url_prefix=f"{V1}/auth", auth=auth.signed_in)
    api.register_blueprint(web_login.blueprint, url_prefix=f"{V1}/auth/wechat", auth=auth.public)
    api.register_blueprint(users.administration, url_prefix=f"{V1}/users", auth=auth.administrators)
    api.register_blueprint(users.blueprint, url_prefix=f"{V1}/users", auth=auth.signed_in)
    api.register_blueprint(personal_data.blueprint, url_prefix=f"{V1}/users", auth=auth.signed_in)
    api.register_blueprint(orders.blueprint, url_prefix=f"{V1}/orders", auth=auth.signed_in)
    api.register_blueprint(messages.blueprint, url_prefix=f"{V1}/wechat", auth=auth.public)  # signed by WeChat itself

    # Client code in the field calls the login without a version.
    app.add_url_rule("/api/auth/wechat", endpoint="login.log_in", methods=["POST"])
