import pytest
from PIL import Image

from charforgex.curation.captions.base import Context
from charforgex.curation.captions.conversation import Answer, Questions, converse, shrink, whole, without_special
from charforgex.curation.captions.settings import CaptionSettings
from charforgex.errors import ConfigError, DataError


def echo(log):
    """Answers with the number of the turn and what was asked last, and notes all that it is given."""

    def answer(indices, conversations):
        log.append((list(indices), [list(said) for said in conversations]))
        return [Answer(f"<{len(said) // 2}> {said[-1][1]}", True) for said in conversations]

    return answer


def test_later_turns_see_earlier_questions_and_answers():
    log = []
    questions = Questions({"any": ("What is there?", "You said {{ answers[0] }}. And the light?")}, "captions.turns")
    assert converse(questions, [Context("a")], echo(log)) == ["<1> You said <0> What is there?. And the light?"]
    assert log[1][1] == [
        [("user", "What is there?"), ("assistant", "<0> What is there?"), ("user", "You said <0> What is there?. And the light?")]
    ]


def test_each_framing_has_its_own_conversation_and_length():
    log = []
    questions = Questions({"any": ("any",), "portrait": ("face", "hair")}, "captions.turns")
    contexts = [Context("a", framing="portrait"), Context("b"), Context("c", framing="full")]
    assert converse(questions, contexts, echo(log)) == ["<1> hair", "<0> any", "<0> any"]
    assert [indices for indices, _ in log] == [[0, 1, 2], [0]]
    assert questions.reads == {"framing"}


def test_what_was_said_before_comes_first():
    log = []
    questions = Questions({"any": ("Shorter.",)}, "captions.turns")
    converse(questions, [Context("a", turns=(("Describe it.", "A very long text."),))], echo(log))
    assert log[0][1] == [[("user", "Describe it."), ("assistant", "A very long text."), ("user", "Shorter.")]]


def test_a_template_knows_the_context_and_says_what_it_reads():
    template = "{{ name }} {{ captions|join('; ') }} {{ framing }} {{ trigger }} {% if class_word %}{{ class_word }}{% endif %}"
    questions = Questions({"any": (template,)}, "captions.turns")
    context = Context("n", captions=("x", "y"), framing="upper", trigger="ohwx", class_word="man")
    assert questions.ask(context, 0, []) == "n x; y upper ohwx man"
    assert questions.reads == {"name", "captions", "framing", "trigger", "class_word"}


def test_the_question_that_is_asked_by_default():
    questions = Questions(CaptionSettings().turns, "captions.turns")
    asked = questions.ask(Context("a", framing="upper", class_word="woman"), 0, [])
    assert asked.startswith("Describe this half-length picture of a woman in one plain sentence: ")
    assert questions.ask(Context("a"), 0, []).startswith("Describe this picture in one plain sentence: ")
    assert questions.reads == {"framing", "class_word"}


def test_templates_are_checked_before_a_model_is_loaded():
    with pytest.raises(ConfigError, match=r"captions.turns: the template '\{\{ name' cannot be read"):
        Questions({"any": ("{{ name",)}, "captions.turns")
    with pytest.raises(ConfigError, match="asks for traits; known are captions, class_word, framing, name, trigger, answers"):
        Questions({"any": ("{{ traits }}",)}, "captions.turns")


@pytest.mark.parametrize("template", ["{{ name.__class__.__mro__ }}", "{{ captions[3] }}", "{{ framing.upper() }}", "{{ trigger|length }}"])
def test_a_template_neither_escapes_nor_says_nothing_for_something_missing(template):
    with pytest.raises(DataError, match="the template of turn 1 does not fit this picture"):
        Questions({"any": (template,)}, "captions.turns").ask(Context("a"), 0, [])


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (Answer("A man. He runs", True), "A man. He runs"),
        (Answer("A man. He runs and ru", False), "A man."),
        (Answer("A man who ru", False), "A man who ru"),
        (Answer("<think>Is it? A man.</think>A dog.", True), "A dog."),
        (Answer("Is it? A man.</think>\n<answer>A dog.</answer>", True), "A dog."),
        (Answer("<think>Is it a man? It", False), ""),
    ],
)
def test_thinking_and_torn_sentences_are_no_caption(answer, said):
    assert whole(answer) == said


def test_special_tokens_are_no_words_declared_or_not():
    assert without_special("<|box|>a <b> man<eos><think>x</think>", ["<eos>", "<think>"]) == "a <b> man<think>x</think>"


def test_large_pictures_are_made_smaller_and_the_original_stays():
    picture = Image.new("RGB", (3072, 100))
    assert shrink(picture).size == (1536, 50) and picture.size == (3072, 100)
    assert shrink(Image.new("L", (8, 8))).mode == "RGB"
