import pickle
import shutil

import pytest
import torch

from charforgex.data.cache import Cache, key_of
from charforgex.errors import DataError

KEY = key_of("latent", picture="a", flip=False)
ENTRY = {"mean": torch.arange(6.0).view(1, 2, 3), "std": torch.ones(1, 2, 3)}


def equal(one, two):
    return one is not None and one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in two)


def test_what_is_written_is_found(tmp_path):
    Cache(tmp_path).write(KEY, ENTRY)
    assert equal(Cache(tmp_path).find(KEY), ENTRY)
    assert Cache(tmp_path).find(key_of("latent", picture="b", flip=False)) is None


def test_every_part_of_a_key_counts():
    keys = [key_of("latent", picture="a", flip=False), key_of("text", picture="a", flip=False), key_of("latent", picture="a", flip=True),
            key_of("latent", picture="a", flip=0), key_of("latent", picture="a"), key_of("latent", picture="é", flip=False)]  # fmt: skip
    assert len(set(keys)) == len(keys)
    assert key_of("latent", flip=False, picture="a") == KEY


@pytest.mark.parametrize("share", range(0, 100, 9))
def test_a_changed_byte_anywhere_is_noticed(tmp_path, share):
    cache = Cache(tmp_path)
    cache.write(KEY, ENTRY)
    data = bytearray(cache.path(KEY).read_bytes())
    data[len(data) * share // 100] ^= 0x04
    cache.path(KEY).write_bytes(data)
    found = Cache(tmp_path).find(KEY)
    assert found is None or equal(found, ENTRY)  # a changed space of the header's padding changes nothing


@pytest.mark.parametrize("change", [lambda data: b"", lambda data: data[:-1], lambda data: data[:20], lambda data: b"x" * 500])
def test_broken_files_are_absent_and_replaced(tmp_path, change):
    cache = Cache(tmp_path)
    cache.write(KEY, ENTRY)
    cache.path(KEY).write_bytes(change(cache.path(KEY).read_bytes()))
    assert cache.find(KEY) is None
    with pytest.raises(DataError, match="gone or damaged"):
        cache.read(KEY)
    cache.write(KEY, ENTRY)
    assert equal(cache.find(KEY), ENTRY)


def test_an_entry_of_another_tool_has_no_digest(tmp_path):
    from safetensors.torch import save

    cache = Cache(tmp_path)
    cache.path(KEY).parent.mkdir(parents=True)
    cache.path(KEY).write_bytes(save(ENTRY))
    assert cache.find(KEY) is None


def test_numbers_that_are_not_finite_are_not_stored(tmp_path):
    with pytest.raises(DataError, match="not finite"):
        Cache(tmp_path).write(KEY, {"mean": torch.tensor([1.0, float("nan")])})
    assert Cache(tmp_path).find(KEY) is None


def test_memory_is_bounded_and_does_not_travel(tmp_path):
    cache = Cache(tmp_path, memory_limit=60)  # one entry has 48 bytes
    other = key_of("latent", picture="other")
    for key in (KEY, other):
        cache.write(key, ENTRY)
        cache.find(key)
    shutil.rmtree(tmp_path)
    assert equal(cache.find(KEY), ENTRY) and cache.find(other) is None
    assert pickle.loads(pickle.dumps(cache)).find(KEY) is None


def test_a_full_disk_is_said_before(tmp_path):
    cache = Cache(tmp_path / "not" / "yet")
    cache.check_space(1000)
    with pytest.raises(DataError, match=r"needs \d+ MiB .* MiB are free"):
        cache.check_space(2**60)
