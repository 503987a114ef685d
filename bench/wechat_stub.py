"""A WeChat that only logs in, cheaply: `python -m bench.wechat_stub PORT SECONDS` takes so long for each response.

The openid is the last four characters of the code, so that a bench of many logins has few users.
"""

import asyncio
import re
import sys

HEAD = "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: "
CODE = re.compile(rb"js_code=[^& ]*?([^& ]{1,4})[& ]")


async def serve(port: int, seconds: float) -> None:
    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                code = CODE.search(await reader.readuntil(b"\r\n\r\n"))
                await asyncio.sleep(seconds)
                openid = f"o-bench-{code[1].decode()}" if code else "o-bench"
                body = f'{{"openid":"{openid}","session_key":"MDEyMzQ1Njc4OWFiY2RlZg=="}}'
                writer.write(f"{HEAD}{len(body)}\r\n\r\n{body}".encode())
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            writer.close()

    server = await asyncio.start_server(respond, "127.0.0.1", port, backlog=4096)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), float(sys.argv[2])))
