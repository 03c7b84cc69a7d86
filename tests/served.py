"""A real process that serves, and its end."""

import json
import re
import subprocess
import sys
import textwrap

import pytest

SERVE = """
    import json, sys
    from fieldmark.serving.limits import Limits
    from fieldmark.serving.server import serve
    serve(sys.argv[1], port=0, limits=Limits(**json.loads(sys.argv[2])))
"""

# Each batch takes 0.4 s, and is told of on stderr as it begins.
SLOW = """
    import json, sys, time
    from fieldmark.serving import server
    from fieldmark.serving.limits import Limits
    warm_up = server.warm_up
    def slowed(predictor, *rest):
        warm_up(predictor, *rest)
        predict = predictor.predict
        def wait(pixels):
            print("in the model", file=sys.stderr, flush=True)
            time.sleep(0.4)
            return predict(pixels)
        object.__setattr__(predictor, "predict", wait)
        object.__setattr__(predictor, "alone", None)
    server.warm_up = slowed
    server.serve(sys.argv[1], port=0, limits=Limits(**json.loads(sys.argv[2])))
"""


class Served:
    """The process, and the one line that it prints when it is ready."""

    def __init__(self, *arguments, script=SERVE, drain_s=0, **limits):
        limits = json.dumps({"drain_s": drain_s, **limits})
        self.process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments), limits],
            stderr=subprocess.PIPE,
            text=True,
        )

    def url(self):
        self.line = self.process.stderr.readline()
        found = re.search(r" at (http://127\.0\.0\.1:\d+) ", self.line)
        if not found:
            self.process.kill()  # or reading the rest would wait for its end
            pytest.fail(self.line + self.process.stderr.read())
        return found[1]

    def address(self):
        host, _, port = self.url().removeprefix("http://").rpartition(":")
        return host, int(port)

    def end(self, number):
        self.process.send_signal(number)
        return self.wait()

    def wait(self):
        status = self.process.wait(20)
        self.rest = self.process.stderr.read()
        return status

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.process.stderr.close()
