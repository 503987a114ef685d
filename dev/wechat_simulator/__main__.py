# Thousands of slow responses at a time need a greenlet each, not a thread.
from gevent import monkey

monkey.patch_all(ssl=False)  # its HTTP is plain, and its package has loaded ssl before

import argparse

from werkzeug.serving import WSGIRequestHandler, make_server

from dev.wechat_simulator import PushSettings, create_simulator


class QuietHandler(WSGIRequestHandler):
    """Writes no access log, whose lines would contain the app secret."""

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        pass


def web_app(argument: str) -> tuple[str, str]:
    app_id, _, app_secret = argument.partition(":")
    if not (app_id and app_secret):
        raise argparse.ArgumentTypeError("must be ID:SECRET")
    return app_id, app_secret


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m dev.wechat_simulator", description="WeChat's side of one mini-program."
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--port", type=int, help="the TCP port to listen on")
    where.add_argument("--fd", type=int, help="a listening socket")
    parser.add_argument(
        "--host", default="127.0.0.1", help="the IP address to listen on; it gives away every secret it has"
    )
    parser.add_argument("--app-id", required=True)
    parser.add_argument("--app-secret", required=True)
    parser.add_argument(
        "--web-app", type=web_app, action="append", default=[], metavar="ID:SECRET", help="can be repeated"
    )
    parser.add_argument("--push-token", default="")
    parser.add_argument("--push-aes-key", default="", help="43 characters; without it, pushes are plain")
    parser.add_argument("--push-url", default="", help="the default address for pushes")
    options = parser.parse_args()
    push = PushSettings(options.push_token, options.push_aes_key, options.push_url)
    server = make_server(
        options.host,
        options.port or 0,
        create_simulator(options.app_id, options.app_secret, dict(options.web_app), push),
        threaded=True,
        request_handler=QuietHandler,
        fd=options.fd,
    )
    server.socket.listen(4096)  # a burst of connections
    server.serve_forever()


if __name__ == "__main__":
    main()
