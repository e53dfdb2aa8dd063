"""Range requests to the page's server and to the page of an API server."""

import http.client

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from slm.core.manifest import Bundle
from slm.core.tokenizer import Tokenizer
from slm.web.mount import mount
from slm.web.ranges import UnsatisfiableError, requested
from slm.web.server import SiteServer
from slm.web.site import server_site

NAME = "model/onnx/model_quantized.onnx_data"


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (None, None),
        ("bytes=0-", (0, 100)),
        ("bytes=40-", (40, 100)),
        ("bytes=40-59", (40, 60)),
        ("bytes=99-99", (99, 100)),
        ("bytes=40-1000", (40, 100)),
        ("bytes=-30", (70, 100)),
        ("bytes=-1000", (0, 100)),
        ("Bytes=1-2", (1, 3)),
        ("bytes=0-1,4-5", None),
        ("bytes=5-4", None),
        ("bytes=-", None),
        ("items=0-1", None),
        ("bytes=a-b", None),
        ("bytes=+1-2", None),
        ("bytes=" + "9" * 30 + "-", None),
    ],
)
def test_ranges(given: str | None, wanted: tuple[int, int] | None) -> None:
    assert requested(given, None, '"t"', 100) == wanted
    assert requested(given, '"t"', '"t"', 100) == wanted
    assert requested(given, '"older"', '"t"', 100) is None


@pytest.mark.parametrize("given", ["bytes=100-", "bytes=100-200", "bytes=-0"])
def test_ranges_behind_the_end(given: str) -> None:
    with pytest.raises(UnsatisfiableError):
        requested(given, None, None, 100)


def test_the_server_sends_the_rest_of_a_file(server: SiteServer) -> None:
    whole = server.site.read(NAME)
    size = len(whole)
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=20)

    def ask(method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
        connection.request(method, f"/{NAME}", headers={name.replace("_", "-"): each for name, each in headers.items()})
        answer = connection.getresponse()
        return answer.status, {name.lower(): each for name, each in answer.getheaders()}, answer.read()

    status, headers, content = ask()
    assert (status, headers["accept-ranges"], content) == (200, "bytes", whole)
    tag = headers["etag"]
    for start in (1, 1 << 20, size - 1):
        status, headers, content = ask(Range=f"bytes={start}-", If_Range=tag)
        assert (status, content) == (206, whole[start:]) and headers["etag"] == tag
        assert headers["content-range"] == f"bytes {start}-{size - 1}/{size}"
        assert headers["content-length"] == str(size - start) and "content-security-policy" in headers
    status, headers, content = ask(Range=f"bytes={size}-")
    assert (status, headers["content-range"], content) == (416, f"bytes */{size}", b"")
    assert ask(Range="bytes=5-", If_Range='"older"')[0::2] == (200, whole)
    assert ask(Range="bytes=0-1,5-6")[0::2] == (200, whole)
    status, headers, content = ask("HEAD", Range="bytes=5-")
    assert (status, headers["content-length"], content) == (200, str(size), b"")
    connection.close()


def test_the_page_of_an_api_server_has_ranges(shared_bundle: Bundle, tokenizer: Tokenizer) -> None:
    site = server_site(shared_bundle, tokenizer, "mine", key=False, new_tokens=9)
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    mount(app, site)
    client, whole = TestClient(app), site.read("app.js")
    tag = client.get("/app.js").headers["etag"]
    answer = client.get("/app.js", headers={"Range": "bytes=10-19", "If-Range": tag})
    assert (answer.status_code, answer.content) == (206, whole[10:20])
    assert answer.headers["content-range"] == f"bytes 10-19/{len(whole)}"
    answer = client.get("/app.js", headers={"Range": f"bytes={len(whole)}-"})
    assert (answer.status_code, answer.headers["content-range"]) == (416, f"bytes */{len(whole)}")
    assert client.get("/app.js", headers={"Range": "bytes=0-1,3-4"}).content == whole
    assert client.get("/app.js", headers={"If-None-Match": tag}).status_code == 304
    assert client.head("/app.js", headers={"Range": "bytes=10-19"}).status_code == 200
