import base64
import io
import json
import logging
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from charforgex.curation.captions import endpoint
from charforgex.curation.captions.base import Context, get_captioner
from charforgex.curation.captions.cache import Job, caption_all
from charforgex.curation.captions.settings import CaptionSettings
from charforgex.errors import ConfigError, ModelError

KEY = "sk-very-secret-0123"


class Server(ThreadingHTTPServer):
    """Says the colour of the picture and the last question. `plan(request)` may answer otherwise: a status, headers and a body."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests, self.plan, self.lock = [], lambda request: None, threading.Lock()
        self.together = self.most_together = 0
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        request = {"path": self.path, "headers": dict(self.headers), "body": body}
        server = self.server
        with server.lock:
            server.requests.append(request)
            server.together += 1
            server.most_together = max(server.most_together, server.together)
        status, headers, reply = server.plan(request) or (200, {}, self.answer(body))
        with server.lock:
            server.together -= 1
        data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def answer(self, body):
        picture, question = body["messages"][0]["content"]
        kind, _, data = picture["image_url"]["url"].partition(",")
        assert kind == "data:image/jpeg;base64"
        red, _, blue = Image.open(io.BytesIO(base64.b64decode(data))).getpixel((0, 0))
        last = body["messages"][-1]["content"]
        asked = last if isinstance(last, str) else question["text"]
        return said(f"{'Red' if red > blue else 'Blue'}: {asked}")

    def log_message(self, *args):
        pass


def said(text, finish="stop"):
    return {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish}]}


@pytest.fixture
def server():
    one = Server()
    thread = threading.Thread(target=one.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield one
    one.shutdown()
    one.server_close()
    thread.join()


@pytest.fixture
def pauses(monkeypatch):
    waited = []
    monkeypatch.setattr(endpoint.time, "sleep", waited.append)
    return waited


def captioner(server, **options):
    options = {"turns": {"any": ("What of {{ name }}?",)}, "retries": 3, **options}
    return get_captioner(CaptionSettings(backend="endpoint", source="cogvlm2", url=server.url, **options))


RED, BLUE = Image.new("RGB", (20, 10), (255, 0, 0)), Image.new("RGB", (20, 10), (0, 0, 255))
CONTEXTS = [Context("a"), Context("b")]


def test_pictures_and_questions_arrive_and_answers_come_in_order(server):
    assert captioner(server, max_tokens=77).caption([RED, BLUE], CONTEXTS) == ["Red: What of a?", "Blue: What of b?"]
    request = server.requests[0]
    assert request["path"] == "/v1/chat/completions" and "Authorization" not in request["headers"]
    assert {name: request["body"][name] for name in ("model", "max_tokens", "temperature")} == {
        "model": "cogvlm2",
        "max_tokens": 77,
        "temperature": 0,
    }


def test_a_conversation_sends_what_was_said(server):
    turns = {"any": ("Who?", "And {{ answers[0] }}?")}
    assert captioner(server, turns=turns).caption([RED], CONTEXTS[:1]) == ["Red: And Red: Who??"]
    first, second = (request["body"]["messages"] for request in server.requests)
    assert second[0] == first[0] and [message["role"] for message in second] == ["user", "assistant", "user"]
    assert [message["content"] for message in second[1:]] == ["Red: Who?", "And Red: Who??"]


def test_a_batch_is_under_way_at_once(server):
    barrier = threading.Barrier(4, timeout=20)
    server.plan = lambda request: barrier.wait() and None
    assert len(captioner(server).caption([RED, BLUE] * 2, CONTEXTS * 2)) == 4
    assert server.most_together == 4


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again_after_longer_and_longer(server, pauses, status):
    server.plan = lambda request: (status, {}, {"error": "busy"}) if len(server.requests) < 4 else None
    assert captioner(server).caption([RED], CONTEXTS[:1]) == ["Red: What of a?"]
    assert pauses == [1, 2, 4]


def test_a_server_may_say_how_long_to_wait(server, pauses):
    server.plan = lambda request: (
        (429, {"Retry-After": "17" if len(server.requests) == 1 else "9999"}, {}) if len(server.requests) < 3 else None
    )
    captioner(server).caption([RED], CONTEXTS[:1])
    assert pauses == [17, 60]


def test_a_server_that_stays_away_stops_the_run(server, pauses):
    server.plan = lambda request: (502, {}, b"bad gateway")
    with pytest.raises(ModelError, match=r"gave no answer in 4 tries; the last: 502 Bad Gateway: bad gateway"):
        captioner(server).caption([RED], CONTEXTS[:1])
    assert len(server.requests) == 4


def test_nobody_listens(pauses):
    settings = CaptionSettings(backend="endpoint", source="m", url="http://127.0.0.1:9", retries=1)
    with pytest.raises(ModelError, match="in 2 tries; the last: URLError"):
        get_captioner(settings).caption([RED], CONTEXTS[:1])


def test_a_slow_server_is_not_waited_for(server, pauses):
    wait = threading.Event()
    server.plan = lambda request: wait.wait(20) and None
    try:
        with pytest.raises(ModelError, match="in 1 tries; the last: TimeoutError"):
            captioner(server, timeout=0.2, retries=0).caption([RED], CONTEXTS[:1])
    finally:
        wait.set()


def test_one_refused_picture_costs_only_itself(server, caplog, tmp_path):
    def plan(request):
        return (400, {}, {"error": "not this one"}) if "What of b?" in json.dumps(request["body"]) else None

    server.plan, reports = plan, []
    jobs = [Job(f"{n:064x}", lambda: RED, Context(name)) for n, name in enumerate("abc")]
    with caplog.at_level(logging.WARNING):
        texts = list(caption_all(captioner(server), jobs, tmp_path, 3, lambda *problem: reports.append(problem)))
    assert [text for _, text in texts] == ["Red: What of a?", "Red: What of c?"] and len(server.requests) == 3
    assert [name for name, _ in reports] == ["b"] and "not this one" in caplog.text


@pytest.mark.parametrize("reply", [b"<html>", {"choices": []}, {"choices": [{"message": {"content": None}}]}, [], said("")])
def test_a_reply_without_a_text_is_no_caption(server, reply):
    server.plan = lambda request: (200, {}, reply)
    assert captioner(server).caption([RED], CONTEXTS[:1]) == [""]


def test_what_was_cut_off_ends_with_a_sentence(server):
    server.plan = lambda request: (200, {}, said("A man. He wears a", "length"))
    assert captioner(server).caption([RED], CONTEXTS[:1]) == ["A man."]


def test_the_key_comes_from_the_environment_and_goes_nowhere_else(server, monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("OUR_KEY", KEY)
    one = captioner(server, key_variable="OUR_KEY")
    with caplog.at_level(logging.DEBUG):
        list(caption_all(one, [Job("0" * 64, lambda: RED, CONTEXTS[0])], tmp_path, 1, pytest.fail))
        assert server.requests[0]["headers"]["Authorization"] == f"Bearer {KEY}"
        server.plan = lambda request: (400, {}, {"error": f"what is {KEY}?"})
        assert one.caption([RED], CONTEXTS[:1]) == [""]
        server.plan = lambda request: (401, {}, {"error": f"wrong key {KEY}"})
        with pytest.raises(ModelError, match=r"refuses: 401 Unauthorized.*wrong key \*\*\*") as refused:
            one.caption([RED], CONTEXTS[:1])
    written = "".join(path.name + path.read_text() for path in tmp_path.iterdir())
    assert KEY not in caplog.text + one.name + written + str(refused.value) and "what is ***?" in caplog.text


def test_a_redirect_does_not_carry_the_key_elsewhere(server, monkeypatch):
    monkeypatch.setenv("OUR_KEY", KEY)
    server.plan = lambda request: (302, {"Location": f"{server.url}/elsewhere"}, b"") if len(server.requests) == 1 else None
    with pytest.raises(ModelError, match="refuses: 302"):
        captioner(server, key_variable="OUR_KEY").caption([RED], CONTEXTS[:1])
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"url": "file:///etc/passwd"}, "is no address of a server"),
        ({"url": "localhost:8000/v1"}, "is no address of a server"),
        ({"url": "http://me:word@host/v1"}, "has a name, password or query in it"),
        ({"url": "http://host/v1?key=1"}, "has a name, password or query in it"),
        ({"url": "http://host/v1", "key_variable": "CHARFORGEX_NO_SUCH"}, "the environment has no such variable"),
        ({"url": "http://host/v1", "key_variable": "BROKEN_KEY"}, "what it holds is no key"),
    ],
)
def test_addresses_and_keys_are_checked_first(options, said, monkeypatch):
    monkeypatch.setenv("BROKEN_KEY", "a\nb")
    with pytest.raises(ConfigError, match=said) as error:
        get_captioner(CaptionSettings(backend="endpoint", source="m", **options))
    assert "word" not in str(error.value).replace("password", "")
