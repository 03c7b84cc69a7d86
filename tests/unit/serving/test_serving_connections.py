"""connections.py: slow clients lose their connection, and fast ones never do."""

import contextlib
import json
import re
import resource
import socket
import subprocess
import sys
import time
import urllib.request

import httpx
import pytest
from served import Served

from fieldmark.serving.connections import network_of

REQUEST = b"GET /livez HTTP/1.1\r\nHost: here\r\n\r\n"
POST = b"POST /v1/classify HTTP/1.1\r\nHost: here\r\nContent-Length: %d\r\n\r\n"


def all_of(client):
    """What the server still sends, until it closes; a reset is an end, too."""
    client.settimeout(10)
    found = b""
    while True:
        try:
            chunk = client.recv(65536)
        except ConnectionResetError:
            return found
        if not chunk:
            return found
        found += chunk


def refused(url):
    """The metric that counts connections ended, by reason."""
    with urllib.request.urlopen(f"{url}/metrics") as page:
        lines = page.read().decode().splitlines()
    found = [line for line in lines if line.startswith("fieldmark_refused_total{")]
    return {line.split('"')[1]: float(line.rpartition(" ")[2]) for line in found}


def num_answered(url):
    """How many requests of no route of ours, such as for the description, had their answer."""
    of = r'^fieldmark_requests_total\{reason="",route="other",status="200"\} (\S+)$'
    found = re.search(of, httpx.get(f"{url}/metrics").text, re.MULTILINE)
    return float(found[1]) if found else 0


def connect(url):
    host, _, port = url.removeprefix("http://").rpartition(":")
    return socket.create_connection((host, int(port)))


def drip(client, data, every_s):
    """Send a byte now and then, until the server hangs up or all is sent; return how many."""
    for sent in range(len(data)):
        try:
            client.send(data[sent : sent + 1])
        except OSError:
            return sent
        time.sleep(every_s)
    return len(data)


def test_headers_that_drip_end_with_408(tiny_package):
    with Served(tiny_package, header_timeout_s=1) as served:
        url = served.url()
        with connect(url) as client:
            began = time.monotonic()
            sent = drip(client, REQUEST[:-2] + b"X: " + b"x" * 1000, 0.05)
            assert sent < 500
            assert all_of(client).startswith(b"HTTP/1.1 408 ") or sent  # or it was reset first
            assert time.monotonic() - began < 10
        assert refused(url) == {"slow_header": 1}


def test_a_silent_connection_is_closed(tiny_package):
    with Served(tiny_package, header_timeout_s=0.5) as served:
        url = served.url()
        with connect(url) as client:
            assert all_of(client) == b""
        assert refused(url) == {"slow_header": 1}


def test_a_body_that_drips_ends_with_408(tiny_package, encode):
    with Served(tiny_package, body_timeout_s=0.5, header_timeout_s=60) as served:
        url = served.url()
        with connect(url) as client:
            client.sendall(POST % 1000 + b"x")
            answer = all_of(client)
            assert answer.startswith(b"HTTP/1.1 408 Request Timeout\r\n")
            assert b"slow_body" in answer
        # Answered before its body is there (it is too large), it may not keep the connection.
        with connect(url) as client:
            client.sendall(POST % 20_000_000)
            assert all_of(client).startswith(b"HTTP/1.1 413 ")
        assert httpx.post(f"{url}/v1/classify", content=encode("red")).status_code == 200
        assert refused(url)["slow_body"] >= 1


@pytest.mark.slow
def test_an_answer_that_nobody_takes_ends_the_connection(tiny_package):
    with Served(tiny_package, write_timeout_s=0.5) as served:
        url = served.url()
        with connect(url) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            page = b"GET /openapi.json HTTP/1.1\r\nHost: here\r\n\r\n"
            num_sent, deadline = 0, time.monotonic() + 120
            while not refused(url).get("slow_reader"):
                assert time.monotonic() < deadline
                if num_answered(url) == num_sent:  # as more than 8 at once would be refused
                    with contextlib.suppress(ConnectionError):  # it was ended just now
                        client.sendall(page * 4)
                    num_sent += 4
                time.sleep(0.05)
        assert refused(url)["slow_reader"] == 1


def test_deadlines_are_of_a_request_and_not_of_its_connection(tiny_package, encode):
    with Served(tiny_package, header_timeout_s=1, body_timeout_s=1) as served:
        url = served.url()
        with connect(url) as client, client.makefile("rb") as reader:
            body = encode("red")
            for _ in range(4):
                client.sendall(POST % len(body))
                time.sleep(0.3)
                client.sendall(body)
                head = b"".join(iter(reader.readline, b"\r\n"))
                assert head.startswith(b"HTTP/1.1 200 OK\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
                assert len(reader.read(length)) == length
                time.sleep(0.3)
        assert refused(url) == {}


@pytest.mark.slow
def test_the_deadline_of_a_phase_that_is_over_is_not_the_next_one_s(tiny_package, encode):
    """One timer serves all: it rings for the shortest, and is set again for what is left."""
    image = encode("red")
    limits = {"header_timeout_s": 0.4, "body_timeout_s": 0.4, "idle_timeout_s": 1.2}
    with Served(tiny_package, **limits) as served, connect(served.url()) as client:
        for _ in range(2):
            client.sendall(POST % len(image) + image[:9])
            time.sleep(0.2)
            client.sendall(image[9:])
            assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
            time.sleep(0.7)  # beyond the deadlines of header and body
        client.sendall(POST.replace(b"/v1/classify", b"/nothing") % 9 + b"abc")
        assert client.recv(65536).startswith(b"HTTP/1.1 404 ")
        time.sleep(0.2)
        client.sendall(b"abcdef")  # with that uvicorn's timer is gone
        client.settimeout(5)
        assert client.recv(65536) == b""  # closed, and nothing said


def test_an_idle_deadline_is_not_one_of_the_next_request(tiny_package, encode):
    image = encode("red")
    with Served(tiny_package, idle_timeout_s=0.5) as served, connect(served.url()) as client:
        client.sendall(REQUEST)
        assert client.recv(1000).startswith(b"HTTP/1.1 200 ")
        client.sendall(POST % len(image) + image[:10])
        time.sleep(1)
        client.sendall(image[10:])
        assert client.recv(1000).startswith(b"HTTP/1.1 200 ")


def test_junk_is_a_400_that_a_program_can_read(tiny_package):
    with Served(tiny_package) as served:
        url = served.url()
        named = b"GET / HTTP/1.1\r\nX-Request-Id: mine-1\r\nAccept: a\r\nHost here\r\n\r\n"
        for junk in (b"\x16\x03\x01 hello\r\n\r\n", named):
            with connect(url) as client:
                client.sendall(junk)
                answer = all_of(client)
                assert answer.startswith(b"HTTP/1.1 400 Bad Request\r\n")
                assert b'"code": "bad_http"' in answer
                identity = b"mine-1" if junk == named else b"[0-9a-f]{32}"
                assert re.search(rb"\r\nx-request-id: " + identity + rb"\r\n", answer)
                assert re.search(rb"\r\ndate: \w{3}, [^\r]* GMT\r\n", answer)
                assert re.search(rb"\r\nx-model-id: [0-9a-f]{64}\r\n", answer)
        assert refused(url) == {"bad_http": 2}
        of = 'reason="bad_http",route="other",status="400"'
        assert f"fieldmark_requests_total{{{of}}} 2.0" in httpx.get(f"{url}/metrics").text


@pytest.mark.parametrize("kind", ["silent", "header", "body"])
def test_many_slow_clients_do_not_stop_a_fast_one(tiny_package, encode, kind):
    """More than there is room for: the slowest makes room, and a fast one never waits."""
    beginning = {"silent": b"", "header": REQUEST[:20], "body": POST % 1000 + b"x"}[kind]
    slow = []
    with Served(tiny_package, max_connections=50, header_timeout_s=60) as served:
        url = served.url()
        try:
            for index in range(200):
                slow.append(connect(url))
                slow[-1].sendall(beginning)
                if index % 20 == 0:
                    answer = httpx.post(f"{url}/v1/classify", content=encode("red"))
                    assert answer.json()["predictions"][0]["class_name"] == "red"
            assert refused(url)["crowded"] >= 150
        finally:
            for client in slow:
                client.close()


def test_idle_connections_make_room_before_an_upload_does(tiny_package, encode):
    image = encode("red")
    with Served(tiny_package, max_connections=20) as served:
        url = served.url()
        idle = [connect(url) for _ in range(15)]
        try:
            for client in idle:
                client.sendall(REQUEST)
                client.recv(1000)
            with connect(url) as upload:
                upload.sendall(POST % len(image) + image[:10])
                more = [connect(url) for _ in range(10)]
                for client in more:
                    client.sendall(REQUEST)
                    assert client.recv(1000).startswith(b"HTTP/1.1 200 ")
                upload.sendall(image[10:])
                assert upload.recv(1000).startswith(b"HTTP/1.1 200 ")
        finally:
            for client in idle + more:
                client.close()


def test_a_body_that_goes_on_after_its_answer_does_not_keep_the_connection(tiny_package):
    with Served(tiny_package, idle_timeout_s=0.5) as served:
        url = served.url()
        with connect(url) as client:
            client.sendall(b"POST /nothing HTTP/1.1\r\nHost: here\r\nContent-Length: 20\r\n\r\n")
            assert client.recv(1000).startswith(b"HTTP/1.1 404 ")
            time.sleep(0.1)
            client.sendall(b"x" * 20)
            all_of(client)  # or it would time out


def test_no_more_connections_than_the_process_may_open_files(tmp_path):
    script = (
        "import resource\n"
        "from fieldmark.serving.connections import room_for_connections as room\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (300, 400))\n"
        "print(room(200), room(1000), resource.getrlimit(resource.RLIMIT_NOFILE)[0])\n"
    )
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 400:
        pytest.skip("this process may open fewer files")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["200", "272", "400"]
    assert "at most 272 connections instead of 1000" in done.stderr


def test_an_address_with_its_full_number_makes_room_of_its_own(tiny_package):
    with Served(tiny_package, max_per_address=5, header_timeout_s=60) as served:
        host, port = served.address()
        url = f"http://{host}:{port}"
        neighbour = socket.create_connection((host, port), source_address=("127.0.0.2", 0))
        greedy = [socket.create_connection((host, port)) for _ in range(5)]
        try:
            neighbour.sendall(REQUEST[:20])  # slower than all of them, and not in their way
            for client in greedy:
                client.sendall(REQUEST[:20])
            greedy.append(connect(url))
            greedy[-1].sendall(REQUEST)
            assert greedy[-1].recv(1000).startswith(b"HTTP/1.1 200 ")
            told = all_of(greedy[0])[:13]  # unless it was ended before its first bytes were read
            assert told in (b"HTTP/1.1 503 ", b"")
            neighbour.sendall(REQUEST[20:])
            assert neighbour.recv(1000).startswith(b"HTTP/1.1 200 ")
            for client in greedy[1:5]:
                client.sendall(REQUEST[20:])
                assert client.recv(1000).startswith(b"HTTP/1.1 200 ")
            assert refused(url)["crowded"] == 2  # the one of this question, too
        finally:
            for client in [neighbour, *greedy]:
                client.close()


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::9", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
    ],
)
def test_an_address_stands_for_one_client(address, network):
    assert network_of(address) == network


@pytest.mark.parametrize(
    ("path", "route"),
    [
        ("/v1/classify", "/v1/classify"),
        ("/v2/models/colours/infer", "/v2/models/{name}/infer"),
    ],
)
def test_a_slow_body_is_answered_counted_and_named_as_what_it_is(tiny_package, path, route):
    head = f"POST {path} HTTP/1.1\r\nHost: here\r\nX-Request-Id: mine-1\r\nContent-Length: 9\r\n"
    with Served(tiny_package, body_timeout_s=0.3) as served:
        url = served.url()
        with connect(url) as client:
            client.sendall(head.encode() + b"\r\nx")
            answer = all_of(client)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"\r\nx-request-id: mine-1\r\n" in answer
        error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
        assert isinstance(error, str) == path.startswith("/v2")
        page = httpx.get(f"{url}/metrics").text
        of = f'reason="slow_body",route="{route}",status="408"'
        assert f"fieldmark_requests_total{{{of}}} 1.0" in page
        assert 'status="400"' not in page


ARRIVING = r"(?m)^fieldmark_bytes_arriving (\S+)$"


def test_bodies_that_stall_make_room_for_one_that_arrives(tiny_package, encode):
    image = encode("red") + bytes(300_000)  # what follows an image is not looked at
    slow = []
    with Served(tiny_package, max_reading_bytes=1_000_000) as served, httpx.Client() as fast:
        url = served.url()
        try:
            for _ in range(2):
                slow.append(connect(url))
                slow[-1].sendall(POST % 500_000 + bytes(490_000))
            # Of each all but the last part, which is not worth waking the request for.
            while float(re.search(ARRIVING, fast.get(f"{url}/metrics").text)[1]) < 800_000:
                time.sleep(0.01)
            reply = fast.post(f"{url}/v1/classify", content=image)
            if reply.status_code == 429:  # they may be about to end
                time.sleep(float(reply.headers["retry-after"]))
            for _ in range(3):
                assert fast.post(f"{url}/v1/classify", content=image).status_code == 200
            assert all_of(slow[0]).startswith(b"HTTP/1.1 408 ")
            slow[1].sendall(bytes(10_000))
            assert slow[1].recv(1000).startswith(b"HTTP/1.1 422 ")  # which was not in the way
        finally:
            for client in slow:
                client.close()


def test_the_slowest_body_is_ended_alone_though_it_is_the_one_that_grows(tiny_package):
    with Served(tiny_package, max_reading_bytes=1_000_000) as served, httpx.Client() as fast:
        url = served.url()
        with connect(url) as first, connect(url) as second:
            for client in (first, second):
                client.sendall(POST % 700_000 + bytes(460_000))
            while float(re.search(ARRIVING, fast.get(f"{url}/metrics").text)[1]) < 750_000:
                time.sleep(0.01)
            time.sleep(1.2)
            first.sendall(bytes(230_000))
            assert all_of(first).startswith(b"HTTP/1.1 408 ")
            second.sendall(bytes(240_000))
            assert second.recv(1000).startswith(b"HTTP/1.1 422 ")
        assert refused(url) == {"slow_body": 1}
