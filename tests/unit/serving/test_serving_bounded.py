"""bounded.py: no head without end, whatever framing a client invents; many requests at once."""

import re
import signal
import socket
import threading
import time

import pytest
from served import SLOW, Served

from fieldmark.serving.bounded import MAX_HEAD_BYTES, MAX_PIPELINED

HEAD = b"POST /v1/classify HTTP/1.1\r\nHost: here\r\n"
ENDLESS = 40 * MAX_HEAD_BYTES


@pytest.fixture(scope="module")
def address(tiny_package):
    with Served(tiny_package) as served:
        yield served.address()


def talk(address, *parts):
    """Send the parts until the server hangs up; return what it says until it closes."""
    with socket.create_connection(address, timeout=20) as client:

        def send():
            for part in parts:
                try:
                    client.sendall(part)
                except OSError:
                    return

        sender = threading.Thread(target=send)
        sender.start()
        found = b""
        try:
            while chunk := client.recv(65536):
                found += chunk
        except ConnectionResetError:
            pass
        sender.join()
        return found


def statuses(answer):
    return re.findall(rb"HTTP/1\.1 (\d{3}) ", answer)


@pytest.mark.parametrize(
    "endless",
    {
        "url": b"POST /" + b"x" * ENDLESS,
        "name": HEAD + b"x" * ENDLESS,
        "value": HEAD + b"X: " + b"x" * ENDLESS,
        "many headers": HEAD + b"X: y\r\n" * (ENDLESS // 6),
        "one that ends": HEAD + b"X: " + b"x" * 2 * MAX_HEAD_BYTES + b"\r\n\r\n",
        "chunk extension": HEAD + b"Transfer-Encoding: chunked\r\n\r\n5;" + b"x" * ENDLESS,
        "trailer": HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\nX: " + b"x" * ENDLESS,
        "trailers": HEAD
        + b"Transfer-Encoding: chunked\r\n\r\n0\r\n"
        + b"X: y\r\n" * (ENDLESS // 6),
    }.items(),
    ids=lambda item: item[0],
)
def test_a_head_without_end_is_refused(address, endless):
    parts = [endless[1][at : at + 10_000] for at in range(0, len(endless[1]), 10_000)]
    answer = talk(address, *parts)
    # The reset may overtake the answer, as the client goes on sending; it never gets another one.
    assert statuses(answer) in ([b"400"], [])
    if answer:
        assert b'"code": "bad_http"' in answer


def test_a_long_body_in_small_chunks_is_no_head(address, encode):
    image = encode("red")
    chunks = b"".join(b"1;a=b\r\n" + image[n : n + 1] + b"\r\n" for n in range(len(image)))
    padding = b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = talk(address, HEAD + padding + chunks + b"0\r\nX-Trailer: is dropped\r\n\r\n")
    assert statuses(answer) == [b"200"]
    assert b'"class_name":"red"' in answer


def test_requests_that_come_together_are_answered_in_their_order(address, encode):
    requests = b"".join(
        HEAD + b"Content-Length: %d\r\n\r\n" % len(image) + image
        for image in (encode("red"), encode("green"), b"junk", encode("blue"))
    )
    last = b"GET /livez HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n"
    answer = talk(address, requests + last)
    assert statuses(answer) == [b"200", b"200", b"422", b"200", b"200"]
    first = re.findall(rb'"predictions":\[\{"class_name":"(\w+)"', answer)
    assert first == [b"red", b"green", b"blue"]


@pytest.mark.parametrize("protocol", [b"h2c", b"websocket"])
def test_who_asks_for_another_protocol_is_answered_in_this_one(address, encode, protocol):
    image = encode("red")
    upgrade = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: " + protocol + b"\r\n"
    posted = HEAD + upgrade + b"Content-Length: %d\r\n\r\n" % len(image) + image
    asked = b"GET /livez HTTP/1.1\r\nHost: here\r\n" + upgrade + b"\r\n"
    answer = talk(address, posted + posted[:300], posted[300:] + asked, b"\x00\x01 its frames")
    # What follows is no HTTP: refused if all was answered by then, else the end of the connection.
    assert statuses(answer) in ([b"200"] * 3, [b"200"] * 3 + [b"400"])
    assert answer.count(b'"predictions":[{"class_name":"red"') == 2


@pytest.mark.parametrize(
    "request_line", [b"CONNECT here:1 HTTP/1.1", b"OPTIONS * HTTP/1.1", b"GET /\xff HTTP/1.1"]
)
def test_targets_that_are_no_path_are_errors_of_the_client(address, request_line):
    answer = talk(address, request_line + b"\r\nHost: here\r\nConnection: close\r\n\r\n")
    assert statuses(answer)[0] in (b"400", b"404", b"405")


@pytest.mark.parametrize(
    "framing",
    [
        b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
        b"Transfer-Encoding: gzip, chunked, chunked\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
        b"Content-Length: +3\r\n\r\nabc",
    ],
)
def test_framing_that_two_servers_could_read_in_two_ways_is_refused(address, framing):
    """Else a request could hide in the body of another (RFC 9112, section 11.2)."""
    hidden = b"GET /livez HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n"
    assert statuses(talk(address, HEAD + framing + hidden)) == [b"400"]


def test_the_head_of_an_answer_without_a_body_is_sent(address):
    with socket.create_connection(address, timeout=20) as client:
        for _ in range(2):
            client.sendall(b"HEAD /livez HTTP/1.1\r\nHost: here\r\n\r\n")
            answer = client.recv(65536)
            assert answer.startswith(b"HTTP/1.1 200 ")
            assert answer.endswith(b"\r\n\r\n")


def test_requests_without_end_before_an_answer_are_not_all_read(address):
    one = b"GET /livez HTTP/1.1\r\nHost: here\r\n\r\n"
    assert statuses(talk(address, one * 5000)) == [b"200"] * MAX_PIPELINED
    asking = one.replace(b"\r\n\r\n", b"\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n")
    assert statuses(talk(address, asking * 2000)) == [b"200"] * MAX_PIPELINED


@pytest.mark.parametrize("path", [b"/v1/classify", b"/nothing"])
def test_a_body_that_breaks_gets_no_answer_of_another_request(address, encode, path):
    image = encode("red")
    whole = HEAD + b"Content-Length: %d\r\n\r\n" % len(image) + image
    chunked = b"POST " + path + b" HTTP/1.1\r\nHost: here\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert statuses(talk(address, whole + chunked + b"3\r\nabc\r\nnot a length\r\n")) == [b"200"]
    with socket.create_connection(address, timeout=20) as client:
        client.sendall(chunked + b"3\r\nabc\r\n")
        time.sleep(0.3)  # /nothing has been answered by now
        client.sendall(b"not a length\r\n")
        found = b""
        while chunk := client.recv(65536):
            found += chunk
        assert statuses(found) == [b"404" if path == b"/nothing" else b"400"]


@pytest.mark.slow
def test_what_follows_a_broken_body_does_not_cost_the_answers_before_it(tiny_package, encode):
    image = encode("red")
    whole = HEAD + b"Content-Length: %d\r\n\r\n" % len(image) + image
    chunked = HEAD + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\nnot a length\r\n"
    with Served(tiny_package, script=SLOW) as served:
        with socket.create_connection(served.address(), timeout=20) as client:
            client.sendall(whole + whole)
            client.sendall(chunked)
            found = b""
            for _ in range(2):  # while the first is in the model, and once it is answered
                time.sleep(0.3)
                client.sendall(b"and more\r\n")
            while chunk := client.recv(65536):
                found += chunk
        assert statuses(found) == [b"200", b"200"]
        assert served.end(signal.SIGTERM) == 0
        assert served.rest == "in the model\n" * 2


def test_who_speaks_http_1_0_is_answered_once(address):
    old = b"GET /livez HTTP/1.0\r\nHost: here\r\n"
    for more in (b"", b"Connection: Upgrade\r\nUpgrade: h2c\r\n"):
        assert statuses(talk(address, old + more + b"\r\n")) == [b"200"]


def test_who_waits_for_100_gets_it_before_the_body_is_there(address, encode):
    image = encode("blue")
    head = HEAD + b"Expect: 100-continue\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
    with socket.create_connection(address, timeout=20) as client:
        client.sendall(head % len(image))
        assert client.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(image)
        assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
