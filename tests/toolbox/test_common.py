"""What all tools refuse before they begin, and what they say of a header that lies."""

import errno
import json

import pytest

from charforgex.errors import ConfigError
from charforgex.toolbox.common import Inputs, Outputs, check_place, lineage, opened_loras, parsed, writing
from tests.toolbox.bases_on_disk import lora_for


def test_places_that_cannot_be_written_are_refused(tmp_path):
    (tmp_path / "letter.txt").write_text("mine")
    (tmp_path / "folder.safetensors").mkdir()
    below, folder = tmp_path / "letter.txt" / "deep" / "a.safetensors", tmp_path / "folder.safetensors"
    for out, said in ((below, "lies below .*letter.txt, which is no folder"), (folder, "is a folder; name a file")):
        with pytest.raises(ConfigError, match=said):
            Outputs(out=out, overwrite=True).check_out([])
    assert Outputs(out=tmp_path / "new" / "deep" / "a.safetensors").check_out([]).name == "a.safetensors"
    assert check_place(tmp_path / "new" / "deep" / "a.safetensors") == tmp_path and not (tmp_path / "new").exists()


def test_a_full_disk_is_said_in_a_line(tmp_path):
    with (
        pytest.raises(ConfigError, match=r"a\.safetensors cannot be written: No space left on device; make room"),
        writing(tmp_path / "a.safetensors"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_lineage_of_a_hostile_header_can_be_written(tmp_path):
    """Half of a character cannot be written as UTF-8, and NaN is no JSON."""
    for text in ('{"parents": [{"name": "\\ud800"}]}', '{"x": NaN}', "[" * 100_000, "{"):
        assert parsed({"charforgex.lineage": text}, "charforgex.lineage") is None
    assert parsed({"charforgex.lineage": '{"name": "\\ud83d\\ude00"}'}, "charforgex.lineage") == {"name": "\U0001f600"}
    path = lora_for("sdxl", tmp_path / "a.safetensors", pick=lambda name: name.endswith("mid_block.resnets.0.conv1"))
    with opened_loras(Inputs(lora=str(path))) as opened:
        opened.files[0].metadata["charforgex.lineage"] = '{"parents": [{"name": "\\ud800"}]}'
        (parent,) = json.loads(lineage(opened, "resize", {})["charforgex.lineage"])["parents"]
    assert parent.keys() == {"name", "sha256"}
