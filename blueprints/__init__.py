"""Everything that is served, in order: each group of routes, where it is mounted, and who may call it.

`flask.g` holds for one request: `user_id`, who is signed in (policies); `row`, what the view returned, and
`version_checked`, whether its If-Match was compared (preconditions); `code`, the business code of an error (errors);
`database_session` and `after_commit` (database).
"""

from flask import Flask

from blueprints import (
    auth,
    docs,
    health,
    messages,
    metrics,
    order_items,
    orders,
    personal_data,
    policies,
    users,
    web_login,
    wechat_profile,
)
from blueprints.api import Api

V1 = "/api/v1"


def init_app(app: Flask) -> None:
    app.config.update(docs.CONFIG, API_VERSION=app.config["VERSION"])
    api = Api(app)
    api.guard("api-docs", auth=policies.public)  # flask-smorest mounts that one itself
    app.register_blueprint(docs.assets)
    api.guard("docs", auth=policies.public)
    api.register_blueprint(health.blueprint, auth=policies.public)
    api.register_blueprint(metrics.blueprint, auth=policies.scrapers)
    api.register_blueprint(auth.login, url_prefix=f"{V1}/auth", auth=policies.public)
    api.register_blueprint(auth.sessions, url_prefix=f"{V1}/auth", auth=policies.session_holders)
    api.register_blueprint(web_login.blueprint, url_prefix=f"{V1}/auth/wechat", auth=policies.public)
    api.register_blueprint(users.administration, url_prefix=f"{V1}/users", auth=policies.administrators)
    api.register_blueprint(users.blueprint, url_prefix=f"{V1}/users", auth=policies.signed_in)
    api.register_blueprint(wechat_profile.blueprint, url_prefix=f"{V1}/users", auth=policies.signed_in)
    api.register_blueprint(personal_data.blueprint, url_prefix=f"{V1}/users", auth=policies.signed_in)
    api.register_blueprint(orders.blueprint, url_prefix=f"{V1}/orders", auth=policies.signed_in)
    api.register_blueprint(order_items.blueprint, url_prefix=f"{V1}/orders", auth=policies.signed_in)
    api.register_blueprint(messages.blueprint, url_prefix=f"{V1}/wechat", auth=policies.public)  # signed by WeChat

    # Client code in the field calls the login without a version.
    app.add_url_rule("/api/auth/wechat", endpoint="login.log_in", methods=["POST"])
