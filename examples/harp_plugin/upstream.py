"""The server behind the proxy: it answers with what it got, as JSON. `python -m examples.harp_plugin.upstream 4001`"""

import json
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer


class Echo(BaseHTTPRequestHandler):
    """Answers with the path and the headers of a request, and the number of requests so far."""

    requests = 0

    def do_GET(self) -> None:
        type(self).requests += 1
        headers = {name.lower(): value for name, value in self.headers.items()}
        body = json.dumps({"path": self.path, "headers": headers, "requests": self.requests}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def main(port: str = "0") -> None:
    with HTTPServer(("127.0.0.1", int(port)), Echo) as server:
        print(f"http://127.0.0.1:{server.server_port}", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
