"""A broken or hostile file ends in one clear line, in no time and no memory; what is accepted is whole."""

import resource
import struct
import time
from pathlib import Path
from random import Random

import pytest

from charforgex.errors import LoraError
from charforgex.families import bases
from charforgex.lora.formats import MAX_HEADER, open_lora, read_header
from charforgex.toolbox.common import Inputs, opened_loras
from charforgex.toolbox.inspecting import inspected
from tests.lora.hostile import mutated, packed, seeds, unpacked


@pytest.fixture
def memory():
    """A folder whose files never reach a disk, where there is one."""
    import tempfile

    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        yield Path(folder)


def looked_at(path: Path, number: int) -> bool:
    """Whether a file was accepted, after reading all of it in one of the ways in which tools do. Raises whatever is no LoraError."""
    try:
        if number % 7 == 0:
            inspected(path)
        with opened_loras(Inputs(lora=str(path))) as opened:
            (file,) = opened.files
            for name, layer in file:
                assert layer.is_finite and name in file.kinds()
                shape = opened.base.shapes.get(name)
                assert shape is None or layer.fits(shape), f"{name} changes a weight {layer.weight_shape} of {shape}"
    except LoraError as error:
        said = str(error)
        assert said.isprintable() and len(said) < 3000, f"a message of {len(said)} characters: {said[:300]!r}"
        return False
    return True


def fuzz(folder: Path, numbers: range) -> tuple[int, float]:
    """How many mutations were accepted, and the seconds that the slowest took."""
    files, path, slowest, accepted = seeds(folder), folder / "x.safetensors", 0.0, 0
    for header, data in files:
        path.write_bytes(packed(header, data))
        assert looked_at(path, 0)
    for number in numbers:
        path.write_bytes(mutated(*Random(number).choice(files), number))
        started = time.process_time()
        try:
            accepted += looked_at(path, number)
        except BaseException as error:
            raise AssertionError(f"mutation {number} ended in {type(error).__name__}: {error}") from error
        slowest = max(slowest, time.process_time() - started)
    return accepted, slowest


def test_mutated_files_are_refused_in_one_line_or_read_right(memory):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    accepted, slowest = fuzz(memory, range(2_000))
    assert 20 < accepted < 1_000  # both ends are met
    assert slowest < 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_hundred_thousand_mutations(memory):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    accepted, slowest = fuzz(memory, range(2_000, 102_000))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"{accepted} of 100000 mutations were accepted; the slowest took {slowest:.2f} s; memory grew by {grown / 1024:.0f} MiB")
    assert slowest < 5 and grown < 500_000


def test_a_header_out_of_all_proportion_is_not_read(memory):
    path = memory / "x.safetensors"
    entry = b'":{"dtype":"F32","shape":[1],"data_offsets":[%d,%d]}'
    million = b"{" + b",".join(b'"lora_unet_%d' % i + entry % (4 * i, 4 * i + 4) for i in range(1_000_000)) + b"}"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(million)) + million)
        file.truncate(8 + len(million) + 4_000_000)
    with pytest.raises(LoraError, match=rf"has a header of {len(million)} bytes; an adapter's has at most {MAX_HEADER}"):
        read_header(path)
    few = b"{" + b",".join(b'"k%d' % i + entry % (4 * i, 4 * i + 4) for i in range(60_000)) + b"}"
    path.write_bytes(packed(few, bytes(240_000)))
    with pytest.raises(LoraError, match="has 60000 keys of up to 6 characters; an adapter has at most 50000"):
        read_header(path)
    with path.open("wb") as file:  # a gigabyte of nothing, and a header that says it is all of it
        file.write(struct.pack("<Q", 1 << 30))
        file.truncate((1 << 30) + 8)
    with pytest.raises(LoraError, match="has a header of 1073741824 bytes"):
        bases.base_of_file(path)


def test_no_numbers_are_found_when_their_layer_is_read(memory):
    """Not when the file is opened, which would read all of it; and the file is named, of several the right one."""
    header, data = seeds(memory)[0]
    good, bad = memory / "good.safetensors", memory / "bad.safetensors"
    good.write_bytes(packed(header, data))
    key = next(key for key in header if key.endswith("lora_up.weight"))
    start = header[key]["data_offsets"][0]
    bad.write_bytes(packed(header, data[:start] + b"\x00\x7e" + data[start + 2 :]))
    with opened_loras(Inputs(lora=[str(bad), str(good)])) as opened, pytest.raises(LoraError, match=r"bad\.safetensors: .*not finite"):
        opened.files[0].load()
    broken, hashed = inspected(bad)["problems"]
    assert broken.endswith(f"{key} holds values that are not finite.") and "sshs_model_hash is of other tensors" in hashed
    assert inspected(good)["problems"] == []
    with open_lora(good, bases.get("charworld_sdxl").names) as file:
        assert all(layer.is_finite for _, layer in file)


def test_what_a_terminal_would_obey_is_escaped(memory):
    header, data = seeds(memory)[0]
    key = next(key for key in header if key.endswith("lora_up.weight"))
    path = memory / "x.safetensors"
    path.write_bytes(packed({("\x1b[2J/../\n" + name if name == key else name): entry for name, entry in header.items()}, data))
    with pytest.raises(LoraError, match=r"belong to no module of this sdxl model: \\x1b\[2J/\.\./\\nlora_unet"):
        bases.base_of_file(path)


def test_a_pattern_that_would_take_for_ever_is_not_tried(memory):
    header, data = unpacked(packed(*seeds(memory)[4]))
    told = header["__metadata__"]
    path = memory / "x.safetensors"
    for pattern, said in (("(([a-z_.0-9]+)+)*x", "more than can be tried"), ("(", "cannot be understood")):
        told["lora_adapter_metadata"] = f'{{"transformer.lora_alpha": 1, "transformer.alpha_pattern": {{"{pattern}": 2}}}}'
        path.write_bytes(packed(header, data))
        with pytest.raises(LoraError, match=said):
            bases.base_of_file(path)
    told["lora_adapter_metadata"] = (
        '{"transformer.lora_alpha": 1, "transformer.alpha_pattern": {"attn\\\\.to_q": 2, ".*to_k": 3, "^to_v": 4}}'
    )
    path.write_bytes(packed(header, data))
    with open_lora(path, bases.get("charworld_flux").names) as file:
        alphas = {name.rpartition(".")[2]: layer.alpha for name, layer in file}
    assert (alphas["to_q"], alphas["to_k"], alphas["to_v"]) == (2, 3, 1)
