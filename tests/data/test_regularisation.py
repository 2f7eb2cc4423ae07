"""Pictures of the class are mixed in by number, weighed, and never the character's; captions of the class stand beside the character's."""

import pytest
import torch

from charforgex.data.captions import class_of, without_trigger
from charforgex.data.datamodule import CharacterData
from charforgex.data.dataset import Order
from charforgex.data.regularisation import Mixture, Regularisation
from charforgex.errors import ConfigError, DataError
from tests.data.conftest import draw, flat


@pytest.fixture
def others(tmp_path):
    """Four pictures of the class, one of them wide."""
    for number in range(4):
        draw(tmp_path / "others" / f"{number}.png", 100 + number, (96, 96) if number else (120, 72))
        (tmp_path / "others" / f"{number}.txt").write_text(f"a woman, number {number}")
    return tmp_path / "others"


def test_a_mixture_spreads_its_share_evenly_and_loses_no_picture():
    own, other = Order({(8, 8): range(3)}, 1, 1), Order({(8, 8): range(3, 5)}, 1, 2)
    mixture = Mixture(own, other, 0.4)
    drawn = [mixture.batch(number)[0] for number in range(50)]
    regular = [item >= 3 for item in drawn]
    for number in range(50):
        assert abs(sum(regular[: number + 1]) - 0.4 * (number + 1)) < 1
    assert [item for item in drawn if item < 3] == [own.batch(k)[0] for k in range(30)]
    assert [item for item in drawn if item >= 3] == [other.batch(k)[0] for k in range(20)]


def test_regular_batches_have_their_weight_and_no_others_change(prepared, others):
    """Batches 2, 5, 8, ... of a third are regular; the rest are the very batches of a run without."""
    data, _ = prepared(regularisation=Regularisation(others, weight=0.25, share=0.34), batch_size=2, caption_dropout=0, class_word="woman")
    hashes = {record.sha256 for record in data.regular}
    batches = [data.batch(step) for step in range(12)]
    regular = [set(batch.keys) <= hashes for batch in batches]
    assert [step for step, is_regular in enumerate(regular) if is_regular] == [2, 5, 8, 11]
    for batch, is_regular in zip(batches, regular, strict=True):
        assert (batch.weight_B is not None) == is_regular == (batch.prior is None)
        if is_regular:
            assert batch.weight_B.tolist() == [0.25, 0.25] and all(text.startswith("a woman, number") for text in batch.captions)
    alone, family = prepared(batch_size=2, caption_dropout=0)
    assert family.loaded == []
    own = [batch.keys for batch, is_regular in zip(batches, regular, strict=True) if not is_regular]
    assert own == [alone.batch(step).keys for step in range(8)]
    assert data.dataset_hash != alone.dataset_hash and len(data.val) == len(alone.val)
    assert data.epoch_batches() == 10  # 6 of the character's are 10 of all


def test_workers_change_nothing(prepared, others):
    settings = {"regularisation": Regularisation(others, share=0.5), "batch_size": 2, "class_word": "woman"}
    data, _ = prepared(**settings)
    wanted = [flat(data.batch(step)) for step in range(4, 10)]
    other, _ = prepared(num_workers=2, **settings)
    assert [flat(batch) for batch in other.train_dataloader(range(4, 10))] == wanted


def test_captions_of_the_class(prepared, folder):
    for path in folder.glob("*.txt"):
        path.write_text("a zkx girl, red hat")
    data, family = prepared(trigger="zkx girl", class_word="girl", caption_dropout=0.5, batch_size=4)
    assert set(family.texts) == {"", "a zkx girl, red hat", "a girl, red hat"}
    batch = data.batch(0)
    assert batch.prior.captions == ("a girl, red hat",) * 4  # also where the caption itself is dropped
    assert set(batch.captions) == {"", "a zkx girl, red hat"}
    for text in (batch.prior.text, batch.prior.base_text):
        assert torch.equal(text.tokens_BLD, data.encoded(["a girl, red hat"] * 4).tokens_BLD)
    assert all(batch.prior is None for batch in data.validation())


@pytest.mark.parametrize(
    ("trigger", "word", "found"), [("zatoki woman", None, "woman"), ("ohwx", "man", "man"), ("zkx old man", None, "old man")]
)
def test_the_class_is_said_or_what_the_trigger_has_besides_its_word(trigger, word, found):
    assert class_of(trigger, word) == found
    assert without_trigger(f"a {trigger}, {trigger}ish", trigger, found) == f"a {found}, {trigger}ish"


@pytest.mark.parametrize(
    ("trigger", "word", "complaint"),
    [(None, None, r"needs data\.trigger"), ("ohwx", None, r"class_word=woman"), ("ohwx", "ohwx man", "holds the trigger")],
)
def test_no_class(trigger, word, complaint):
    with pytest.raises(ConfigError, match=complaint):
        class_of(trigger, word)


def test_what_cannot_regularise(folder, others, tmp_path):
    def make(source=others, **settings):
        return CharacterData(folder, tmp_path / "c", 64, trigger="zkx", regularisation=Regularisation(source, **settings))

    with pytest.raises(ConfigError, match=r"regularisation\.weight=0\.5 has no effect without data\.regularisation\.source"):
        Regularisation(weight=0.5)
    with pytest.raises(DataError, match=r"regularisation\.source=.*nowhere"):
        make(tmp_path / "nowhere")
    (others / "1.txt").write_text("zkx at home")
    with pytest.raises(DataError, match=r"1 regularisation pictures hold the trigger: 1\.png"):
        make()
    (others / "1.txt").unlink()
    with pytest.raises(DataError, match=r"1 of 4 regularisation pictures have no caption: 1\.png"):
        make()
    assert make(default_caption="a woman").texts[make(default_caption="a woman").regular[0].sha256]
    (others / "1.png").write_bytes((folder / "03.png").read_bytes())
    with pytest.raises(DataError, match=r"among the character's own: 1\.png"):
        make(default_caption="a woman")
