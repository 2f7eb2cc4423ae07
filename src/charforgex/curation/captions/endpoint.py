"""Any server that speaks OpenAI's `/chat/completions`: CogVLM, and whatever else vLLM, llama.cpp or a company serves.

The key comes from an environment variable and goes into one header; no message, name or file has it, and no redirect is followed with it.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from typing import Any

from PIL import Image

from charforgex.curation.captions.base import Context, captioner_name
from charforgex.curation.captions.conversation import Answer, Questions, Said, converse, shrink
from charforgex.curation.captions.settings import CaptionSettings
from charforgex.errors import ConfigError, DataError, ModelError

logger = logging.getLogger(__name__)
LONGEST_PAUSE = 60.0  # seconds
MAX_BYTES = 2**22  # of a reply
EVERYTHING = {401, 402, 403, 404, 405}  # what holds for every picture; other 4xx may be about this one


class EndpointCaptioner:
    """A batch is what is under way at once. One picture that the server refuses gets no caption, which is logged."""

    def __init__(self, settings: CaptionSettings):
        self.settings, self.model = settings, settings.source_of("endpoint")
        self.url = _checked(settings.url)
        self.key = _key(settings.key_variable)
        self.questions = Questions(settings.turns, "curation.captions.turns")
        self.reads = self.questions.reads | {"turns"}
        self.name = captioner_name("endpoint", self.model, [self.url, self.model, settings.turns, settings.max_tokens])
        self.opener = urllib.request.build_opener(_NoRedirects)

    def caption(self, pictures: Sequence[Image.Image], contexts: Sequence[Context]) -> list[str]:
        with ThreadPoolExecutor(len(pictures)) as pool:
            return list(pool.map(self._one, pictures, contexts))

    def _one(self, picture: Image.Image, context: Context) -> str:
        url = data_url(picture)
        try:
            return converse(self.questions, [context], lambda _, said: [self._ask(url, said[0])])[0]
        except DataError as error:
            logger.warning("%s: %s gave no caption: %s", context.name, self.name, error)
            return ""

    def _ask(self, picture: str, said: Sequence[Said]) -> Answer:
        settings = self.settings
        body = {"model": self.model, "messages": messages(said, picture), "max_tokens": settings.max_tokens, "temperature": 0}
        reply = self._post(json.dumps(body).encode())
        try:
            choice = json.loads(reply)["choices"][0]
            text, ended = choice["message"]["content"], choice.get("finish_reason") != "length"
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise DataError(f"the reply is not of the form of /chat/completions: {self._safe(reply)}") from error
        if not isinstance(text, str):
            raise DataError("the reply has no text")
        return Answer(text, ended)

    def _post(self, data: bytes) -> bytes:
        """The reply's body. Waits and tries again when the server is busy or away. Raises DataError, ModelError."""
        headers = {"Content-Type": "application/json", "User-Agent": "charforgex"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        for attempt in range(self.settings.retries + 1):
            pause = min(2.0**attempt, LONGEST_PAUSE)
            try:
                request = urllib.request.Request(f"{self.url}/chat/completions", data, headers)
                with self.opener.open(request, timeout=self.settings.timeout) as reply:
                    return reply.read(MAX_BYTES)
            except urllib.error.HTTPError as error:
                with error:
                    problem = f"{error.code} {error.reason}: {self._safe(error.read(MAX_BYTES))}"
                if error.code in EVERYTHING or error.code < 400:
                    raise ModelError(
                        f"{self.url} refuses: {problem}. See to curation.captions.url, curation.captions.source, "
                        "curation.captions.key_variable."
                    ) from None
                if error.code < 500 and error.code not in (408, 429):
                    raise DataError(f"the server says {problem}") from None
                pause = _wanted_pause(error.headers.get("Retry-After"), pause)
            except (OSError, HTTPException) as error:  # refused, reset, timed out, cut short
                problem = f"{type(error).__name__}: {getattr(error, 'reason', error)}"
            if attempt < self.settings.retries:
                time.sleep(pause)
        raise ModelError(f"{self.url} gave no answer in {self.settings.retries + 1} tries; the last: {problem}. What is cached stays.")

    def _safe(self, reply: bytes) -> str:
        text = reply.decode("utf-8", "replace")
        return (text.replace(self.key, "***") if self.key else text)[:300]


def messages(said: Sequence[Said], picture: str) -> list[dict[str, Any]]:
    """OpenAI's form: the picture in the first words, what follows as plain text."""
    first = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": said[0][1]}]
    return [{"role": "user", "content": first}, *({"role": role, "content": text} for role, text in said[1:])]


def data_url(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    shrink(picture).save(buffer, "JPEG", quality=95)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _checked(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"curation.captions.url={url} is no address of a server; such as http://localhost:8000/v1")
    if parts.username or parts.password or parts.query:
        raise ConfigError(
            "curation.captions.url has a name, password or query in it, which would be written down; use curation.captions.key_variable."
        )
    return url.rstrip("/").removesuffix("/chat/completions")


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    if not (key := os.environ.get(variable, "").strip()):
        raise ConfigError(
            f"curation.captions.key_variable={variable}: the environment has no such variable; export {variable}=<key> first."
        )
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"curation.captions.key_variable={variable}: what it holds is no key; a line break or a foreign letter is in it.")
    return key


def _wanted_pause(retry_after: str | None, otherwise: float) -> float:
    """Seconds to wait: what the server asks for in seconds, within bounds."""
    if retry_after and retry_after.strip().isdigit():
        return min(float(retry_after), LONGEST_PAUSE)
    return otherwise


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any) -> None:
        return None


def build(settings: CaptionSettings) -> EndpointCaptioner:
    return EndpointCaptioner(settings)
