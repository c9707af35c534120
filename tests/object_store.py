"""An object store on this machine that speaks the S3 protocol, and tells which requests it got."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server

BUCKET = "averages"


class ObjectStore:
    """A WSGI application around the store's.

    Attributes:
        requests: Method, path with query, and bytes of the body of every request since ``watch``.
        most_in_flight: How many requests were being answered at the same time since ``watch``.
        delay_s: How long each answer takes at least.
        refused: Methods that are answered with 403.
        endpoint: Its address, once it listens.
    """

    def __init__(self) -> None:
        self._app = DomainDispatcherApplication(create_backend_app)
        self._lock = threading.Lock()
        self.endpoint = ""
        self.watch()

    def watch(self, *, delay_s: float = 0.0, refused: Iterable[str] = ()) -> None:
        """Forget the requests that were seen, and answer in a way from now on."""
        self.requests: list[tuple[str, str, int]] = []
        self.most_in_flight = self._in_flight = 0
        self.delay_s, self.refused = delay_s, frozenset(refused)

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        target = f"{environ['PATH_INFO']}?{environ.get('QUERY_STRING', '')}"
        with self._lock:
            self.requests.append((environ["REQUEST_METHOD"], target, int(environ.get("CONTENT_LENGTH") or 0)))
            self._in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self._in_flight)
        try:
            time.sleep(self.delay_s)
            if environ["REQUEST_METHOD"] in self.refused:
                start_response("403 Forbidden", [("Content-Type", "application/xml")])
                return (
                    []
                    if environ["REQUEST_METHOD"] == "HEAD"
                    else [b"<Error><Code>AccessDenied</Code><Message>this store is closed</Message></Error>"]
                )
            return [*self._app(environ, start_response)]
        finally:
            with self._lock:
                self._in_flight -= 1


class Quiet(MotoRequestHandler):
    """Answers without a line about each request on stderr."""

    def log_request(self, *args: object) -> None:
        pass


@contextmanager
def serving() -> Iterator[ObjectStore]:
    """An empty object store with one bucket, to which the environment directs whoever opens ``s3://``."""
    store = ObjectStore()
    server = make_server("127.0.0.1", 0, store, threaded=True, request_handler=Quiet)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    store.endpoint = f"http://127.0.0.1:{server.server_port}"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": store.endpoint,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
            "NO_PROXY": "127.0.0.1",
        }.items():
            patch.setenv(name, value)
        client().create_bucket(Bucket=BUCKET)
        try:
            yield store
        finally:
            server.shutdown()
            thread.join()
            server.server_close()


def client() -> Any:
    """Amazon's own client of the store, which shares nothing with fsspec's."""
    import boto3

    return boto3.client("s3")
