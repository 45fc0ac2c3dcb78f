"""The peer of a scrape: Python's own HTTP server in a process that does nothing else, with an answer of fixed length.

Arguments: the port, the length.
"""

from __future__ import annotations

import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Fixed(BaseHTTPRequestHandler):
    """Answers every GET with the same bytes."""

    body = b""

    def do_GET(self) -> None:
        """The bytes."""
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


if __name__ == "__main__":
    Fixed.body = b"#" * int(sys.argv[2])
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Fixed).serve_forever()
