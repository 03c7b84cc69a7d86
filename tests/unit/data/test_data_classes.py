import pytest

from fieldmark.data.classes import imagenet_descriptions, match_classes
from fieldmark.errors import DataError

WNIDS = ["n01440764", "n01443537", "n02012849", "n03126707"]
WORDS = ["tench, Tinca tinca", "goldfish, Carassius auratus", "crane", "crane"]


def test_equal_names_match_in_any_order_and_number():
    assert list(match_classes(["dog", "cat"], ["bird", "cat", "dog"])) == [2, 1]
    assert match_classes(["dog"], ["dog", "cat"]).dtype == "int64"


@pytest.mark.parametrize(
    "name", ["goldfish, Carassius auratus", "goldfish", "Carassius auratus", "Carassius_auratus"]
)
def test_descriptions_and_their_words_match(name):
    assert list(match_classes(["n01440764", name], WNIDS, WORDS)) == [0, 1]


def test_an_exact_name_wins_over_a_word_of_another():
    assert list(match_classes(["cat"], ["cat, tabby", "cat"])) == [1]
    assert list(match_classes(["cat"], ["x", "cat"], ["cat", "tabby"])) == [1]


def test_imagenet_folders_match_classes_called_by_words():
    assert list(match_classes(WNIDS[:2], ["goldfish", "tench"])) == [1, 0]
    assert list(match_classes(WNIDS[:2], ["goldfish, Carassius auratus", "tench, x"])) == [1, 0]


def test_a_missing_class_is_named_with_the_nearest():
    with pytest.raises(DataError) as caught:
        match_classes(["cat", "dogg", "bird"], ["cat", "dog"])
    message = str(caught.value)
    assert "Got 2 of 3 that are not" in message
    assert "'dogg' is none of them. Did you mean 'dog'?" in message
    assert "'bird'" in message
    assert "'cat' is" not in message


def test_many_missing_classes_are_counted():
    with pytest.raises(DataError, match="And 4 more. Rename"):
        match_classes([f"class {index}" for index in range(9)], ["x"])


def test_a_word_of_two_classes_is_no_match():
    with pytest.raises(DataError, match="'crane' means several of the model's classes"):
        match_classes(["crane"], WNIDS, WORDS)
    assert list(match_classes(["n03126707"], WNIDS, WORDS)) == [3]


def test_letter_case_matters():
    with pytest.raises(DataError, match="Did you mean 'cat'"):
        match_classes(["Cat"], ["cat", "dog"])


def test_two_classes_of_the_data_cannot_be_one_of_the_model():
    with pytest.raises(DataError, match=r"\['n01440764', 'tench'\] for 'n01440764'. Merge"):
        match_classes(["n01440764", "tench"], WNIDS, WORDS)


def test_only_known_folder_names_are_described():
    assert imagenet_descriptions(WNIDS[:2]) == tuple(WORDS[:2])
    assert imagenet_descriptions(["n01440764", "cat"]) is None
    assert imagenet_descriptions(["n01440764", "n99999999"]) is None
    assert imagenet_descriptions([]) is None
