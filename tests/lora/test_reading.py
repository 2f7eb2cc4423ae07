"""The same tensors as the library reads, and none of them kept."""

import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from charforgex.errors import LoraError
from charforgex.lora.formats import opened
from charforgex.lora.reading import DTYPES
from charforgex.lora.state import is_finite

PROGRAM = """
import resource, sys
from pathlib import Path
from charforgex.lora.formats import opened
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with opened(Path(sys.argv[1])) as file:
    total = sum(float(file.get_tensor(key).sum()) for key in file.keys())
print(total, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_tensors_of_every_dtype_are_the_library_s(tmp_path):
    draw = torch.Generator().manual_seed(0)
    kinds = [*DTYPES.values(), torch.int64, torch.bool]
    tensors = {str(kind): (torch.randn(3, 5, generator=draw) * 9).to(kind) for kind in kinds}
    tensors |= {"none": torch.zeros(0, 4), "one": torch.tensor(3.5), "turned": torch.arange(6.0).view(3, 2, 1, 1)}
    path = tmp_path / "a.safetensors"
    save_file(tensors, path, {"a": "b"})
    with opened(path) as mine, safe_open(path, "pt") as theirs:
        assert mine.metadata() == {"a": "b"} and set(mine.keys()) == set(tensors)
        for key in tensors:
            one, other = mine.get_tensor(key), theirs.get_tensor(key)
            assert one.dtype == other.dtype and one.shape == other.shape
            assert torch.equal(one.view(-1).view(torch.uint8), other.view(-1).view(torch.uint8))


def test_what_has_been_read_and_let_go_is_not_in_memory(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({str(i): torch.full((1 << 20,), float(i)) for i in range(24)}, path)  # 96 MiB
    done = subprocess.run([sys.executable, "-c", PROGRAM, path], capture_output=True, text=True, check=True)
    total, grown = done.stdout.split()
    assert float(total) == sum(range(24)) * (1 << 20)
    assert int(grown) < 32 * 1024, "KiB; mapped, it would be all of the file"


def test_a_file_that_becomes_shorter_is_told(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(1 << 18)}, path)
    with opened(path) as file:
        with path.open("r+b") as other:
            other.truncate(path.stat().st_size - 100)
        with pytest.raises(LoraError, match=r"a ends after \d+ of 1048576 bytes: the file has become shorter"):
            file.get_tensor("a")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2])
def test_one_value_that_is_no_number_is_found(dtype):
    whole = torch.linspace(-3, 3, 1001)
    assert is_finite(whole.to(dtype)) and is_finite(torch.empty(0, 3, dtype=dtype))
    for value in (float("nan"), float("inf"), -float("inf")):
        for place in (0, 500, 1000):
            broken = whole.clone()
            broken[place] = value
            assert not is_finite(broken.to(dtype))
