"""``ptafuse report --serve``: the page on this machine's loopback address, rendered again at every load."""

import logging
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

logger = logging.getLogger(__name__)


def page_server(page: Callable[[], str], *, port: int) -> ThreadingHTTPServer:
    """Create a server of one page, on 127.0.0.1 only.

    Args:
        page: makes the page's HTML.
        port: 0 takes a free one; ``server_address`` says which.

    Raises:
        OSError: the port is taken.
    """

    class Handler(BaseHTTPRequestHandler):
        """GET / gives the page."""

        def do_GET(self) -> None:
            if self.path.partition("?")[0] != "/":
                self.send_error(404)
                return
            body = page().encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            logger.debug(format, *args)

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)
