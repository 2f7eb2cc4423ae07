import pytest

from charforgex.curation.captions.settings import CaptionSettings
from charforgex.errors import ConfigError


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"backend": "blip3"}, "captions.backend=blip3 is not among the choices.*did you mean blip2"),
        ({"max_tokens": 64}, "curation.captions.max_tokens=64 has an effect only in .*endpoint; curation.captions.backend is sidecar"),
        ({"backend": "tagger", "source": "x", "prompt": "a"}, "curation.captions.prompt=a has an effect only in blip2"),
        ({"backend": "chat"}, "curation.captions.source is not set; chat needs a model that talks about pictures"),
        ({"backend": ("chat", "blip2"), "source": "x"}, r"curation.captions.source=x: whose\? Say .*source={chat: x, blip2: ...}"),
        ({"backend": ("chat", "sidecar"), "source": {"blip2": "x"}}, "curation.captions.source.blip2 is read by nothing"),
        ({"backend": ("sidecar", "sidecar")}, "must name each backend once"),
        ({"backend": ()}, "must name each backend once, and at least one"),
        ({"backend": "endpoint", "source": "m"}, "captions.url is not set"),
        ({"backend": "chat", "source": "x", "turns": {"portrait": ("a",)}}, "needs `any`"),
        ({"backend": "interrogator", "source": "x", "begin": "interrogator"}, "begin with itself"),
        ({"backend": "interrogator", "source": "x", "begin": "blip2"}, "whose"),
    ],
)
def test_what_makes_no_sense_is_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        CaptionSettings(**options)


def test_each_of_several_backends_has_its_own_source_and_options():
    both = CaptionSettings(backend=("chat", "tagger"), source={"chat": "c", "tagger": "t"}, max_tokens=64, general=0.5)
    chat, tagger = both.of("chat"), both.of("tagger")
    assert (chat.backends, chat.source_of("chat"), chat.max_tokens, chat.general) == (("chat",), "c", 64, 0.35)
    assert (tagger.backends, tagger.source_of("tagger"), tagger.max_tokens, tagger.general) == (("tagger",), "t", 128, 0.5)


def test_an_interrogator_brings_the_options_of_what_it_begins_with():
    settings = CaptionSettings(backend=("interrogator", "sidecar"), begin="blip2", source={"interrogator": "i", "blip2": "b"}, prompt="a")
    alone = settings.of("interrogator")
    assert (alone.source_of("interrogator"), alone.prompt) == ("i", "a")
    assert (alone.of("blip2").source, alone.of("blip2").prompt) == ("b", "a")
    assert settings.of("sidecar").source is None
