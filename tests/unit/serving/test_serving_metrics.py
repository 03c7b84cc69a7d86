"""metrics.py, limits.py and heat.py: what is counted, what may be set, what is drawn."""

import base64
import dataclasses
import io
import math

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from fieldmark.errors import ConfigError
from fieldmark.serving.app import create_app
from fieldmark.serving.heat import heat_png
from fieldmark.serving.limits import Limits

URL = "/v1/classify"


def counted(client):
    """All samples of the page, as {(name, labels): value}."""
    text = client.get("/metrics").text
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


class Maps:
    """The maps of `mean_colours`: an image's own colours."""

    def __init__(self):
        self.asked = []

    def run(self, images):
        features = images.transpose(0, 3, 1, 2).astype(np.float32) / 10
        return features.mean(axis=(2, 3)), features

    def maps(self, features, classes):
        self.asked.append(list(classes))
        return features[:, list(classes)]


# --- metrics ---


def test_requests_images_and_batches_are_counted(make_predictor, encode):
    client = TestClient(create_app(make_predictor()), raise_server_exceptions=False)
    files = [("a", encode("red")), ("b", b"broken"), ("c", encode("blue"))]
    assert client.post(URL, files=files).status_code == 200
    assert client.post(URL, content=encode("red")).status_code == 200
    assert client.post(URL, content=b"broken").status_code == 422
    for path in ("/x", "/y/secret", "/v2/models/nobody"):
        assert client.get(path).status_code == 404
    found = counted(client)
    of, none = "fieldmark_requests_total", ("reason", "")
    assert found[of, (none, ("route", URL), ("status", "200"))] == 2
    assert found[of, (none, ("route", URL), ("status", "422"))] == 1
    assert found[of, (none, ("route", "other"), ("status", "404"))] == 2
    assert found[of, (none, ("route", "/v2/models/{name}"), ("status", "404"))] == 1
    assert found["fieldmark_images_total", (("status", "200"),)] == 3
    assert found["fieldmark_images_total", (("status", "422"),)] == 2
    assert found["fieldmark_request_seconds_count", (("route", URL),)] == 3
    assert found["fieldmark_stage_seconds_count", (("stage", "decode"),)] == 3
    assert found["fieldmark_stage_seconds_count", (("stage", "queue"),)] == 3
    assert found["fieldmark_batch_images_sum", ()] == 3
    assert found["fieldmark_images_inside", ()] == 0
    assert found["fieldmark_ready", ()] == 1
    [model] = [dict(labels) for name, labels in found if name == "fieldmark_model_info"]
    assert (model["version"], model["variant"], model["device"]) == ("f" * 12, "onnx", "cpu")
    assert found["process_resident_memory_bytes", ()] > 1e6
    # Labels are ours: nothing that a client chose is among them.
    assert "secret" not in client.get("/metrics").text
    assert "nobody" not in client.get("/metrics").text


def test_failures_and_refusals_are_counted(make_predictor, encode):
    def broken(pixels):
        raise RuntimeError("no")

    limits = Limits(max_reading_bytes=50, max_images=1, max_inside=1)
    client = TestClient(create_app(make_predictor(broken), limits=limits))
    assert client.post(URL, content=b"x" * 40).status_code == 422
    arriving = client.post(URL, content=b"x" * 60)
    assert arriving.status_code == 429
    assert int(arriving.headers["retry-after"]) >= 1
    assert client.post(URL, content=b"x" * 40).status_code == 422  # what was held is free again
    assert counted(client)["fieldmark_refused_total", (("reason", "arriving_full"),)] == 1
    client = TestClient(create_app(make_predictor(broken)), raise_server_exceptions=False)
    assert client.post(URL, content=encode("red")).status_code == 500
    assert counted(client)["fieldmark_batch_failures_total", ()] == 1
    assert counted(client)["fieldmark_images_total", (("status", "500"),)] == 1


def test_openmetrics_for_those_who_prefer_it(make_predictor):
    client = TestClient(create_app(make_predictor()))
    plain = client.get("/metrics")
    assert plain.headers["content-type"].startswith("text/plain")
    accept = {"Accept": "application/openmetrics-text; version=1.0.0"}
    other = client.get("/metrics", headers=accept)
    assert other.headers["content-type"].startswith("application/openmetrics-text")
    assert other.text.endswith("# EOF\n")


# --- limits ---


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"timeout_s": math.nan}, "timeout_s must be a finite number above 0. Got nan"),
        ({"max_wait_s": -1}, "max_wait_s must be a finite number at least 0. Got -1"),
        ({"max_batch_size": 0}, "max_batch_size must be a finite number above 0. Got 0"),
        ({"max_images": 9, "max_inside": 8}, "max_images must be at most max_inside, 8. Got 9"),
        ({"timeout_s": 90}, "timeout_s must be at most max_timeout_s, 60. Got 90"),
        ({"body_timeout_s": math.inf}, "body_timeout_s must be a finite number above 0. Got inf"),
    ],
)
def test_limits_that_cannot_be(limits, message):
    with pytest.raises(ConfigError, match=message):
        Limits(**limits)
    Limits(drain_s=0, max_wait_s=0)


# --- explanations ---


def test_the_likeliest_class_is_explained(make_predictor, encode):
    maps = Maps()
    app = create_app(dataclasses.replace(make_predictor(), maps=maps))
    client = TestClient(app)
    half = Image.new("RGB", (32, 32), "black")
    half.paste("red", (0, 0, 16, 32))
    body = client.post(URL, params={"explain": True}, content=encode(half)).json()
    assert body["predictions"][0]["class_name"] == "red"
    assert body["explanation"]["class_name"] == "red"
    assert maps.asked == [[0]]
    with Image.open(io.BytesIO(base64.b64decode(body["explanation"]["png"]))) as picture:
        assert (picture.format, picture.size, picture.mode) == ("PNG", (16, 16), "RGB")
        drawn = np.asarray(picture).astype(int)
    assert (drawn[:, :6, 0] > drawn[:, :6, 2] + 100).all()  # red spoke for it
    assert (np.ptp(drawn[:, 11:], axis=2) < 10).all()  # black did not
    plain = client.post(URL, content=encode(half)).json()
    assert "explanation" not in plain
    assert plain["predictions"] == body["predictions"]
    files = [("a", encode("green")), ("b", b"broken")]
    first, second = client.post(URL, params={"explain": "true"}, files=files).json()["results"]
    assert first["explanation"]["class_name"] == "green"
    assert (second["status"], "explanation" in second) == (422, False)


def test_what_spoke_against_a_class_is_blue():
    pixels = np.full((20, 40, 3), 128, np.uint8)
    class_map = np.array([[1, -1]], np.float32)
    with Image.open(io.BytesIO(heat_png(pixels, class_map))) as picture:
        drawn = np.asarray(picture).astype(int)
    assert drawn.shape == (20, 40, 3)
    assert (drawn[:, 0, 0] > drawn[:, 0, 2]).all()
    assert (drawn[:, -1, 2] > drawn[:, -1, 0]).all()
    nothing = heat_png(pixels, np.zeros((2, 2), np.float32))
    with Image.open(io.BytesIO(nothing)) as picture:
        assert (np.asarray(picture) == 128).all()


def test_explain_where_it_cannot_be(make_predictor, encode):
    client = TestClient(create_app(make_predictor()))
    refused = client.post(URL, params={"explain": True}, content=encode("red"))
    assert refused.status_code == 400
    assert "variant onnx of this model gives no features" in refused.json()["error"]["message"]
    assert client.post(URL, params={"explain": "perhaps"}, content=b"").status_code == 400
    predictor = dataclasses.replace(make_predictor(), maps=Maps())
    app = create_app(predictor, limits=Limits(max_inside=4, max_images=4))
    files = [("a", encode("green"))] * 3
    refused = TestClient(app).post(URL, params={"explain": True}, files=files)
    assert refused.status_code == 400
    assert "at most 2 images may be explained" in refused.json()["error"]["message"]
