import pytest

from charforgex.errors import ConfigError, LoraError
from charforgex.lora.targets import chosen, each, fits

PATHS = ["down.0.attn.to_q", "down.0.attn.to_k", "down.1.attn.to_q", "mid.ff.net.0.proj"]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("to_q", [0, 2]),
        ("attn.to_k", [1]),
        ("o_q", []),  # ends are whole names
        ("down.0.*", [0, 1]),
        ("*.to_q", [0, 2]),
        (r"re:down\.\d\.attn\.to_[qk]", [0, 1, 2]),
        ("re:to_q", []),  # of the whole path
        (r"re:.*[01]\.attn\.to_q", [0, 2]),
    ],
)
def test_patterns(pattern, found):
    assert [fits(pattern, path) for path in PATHS] == [i in found for i in range(len(PATHS))]


def test_what_fits_nothing_is_named_with_what_there_is():
    assert chosen("lora.targets", ["proj", "to_k"], PATHS) == [PATHS[1], PATHS[3]]
    with pytest.raises(LoraError, match=r"lora\.ranks: to_v matches no .*; they end in proj, to_k, to_q"):
        chosen("lora.ranks", ["to_q", "to_v"], PATHS)
    with pytest.raises(LoraError, match="nothing matches"):
        chosen("lora.targets", [], PATHS)
    with pytest.raises(ConfigError, match=r"re:\[ is no regular expression"):
        chosen("lora.targets", ["re:["], PATHS)


def test_the_last_pattern_that_fits_a_path_counts():
    assert each("lora.ranks", {"to_q": 4, "down.1.*": 2}, 16, PATHS) == dict(zip(PATHS, [4, 16, 2, 16], strict=True))
