import json
import subprocess
import sys

import pytest
from transformers import AutoTokenizer

from medclip_hf.training.tokenizers import train_wordpiece_tokenizer

CAPTIONS = [
    "Chest radiograph with a pneumothorax (arrow).",
    "Axial CT: no pneumothorax, a small pleural effusion.",
    "Naïve T-cells in the pleural fluid; 40× magnification.",
] * 4


def test_no_character_of_the_texts_is_unknown():
    tokenizer = train_wordpiece_tokenizer(CAPTIONS, 200)
    tokens = [token for caption in CAPTIONS for token in tokenizer.tokenize(caption)]
    assert "[UNK]" not in tokens
    assert "pneumothorax" in tokens
    assert len(tokenizer) <= 200


def test_special_tokens_stand_where_bert_has_them():
    tokenizer = train_wordpiece_tokenizer(CAPTIONS, 200)
    encoded = tokenizer("pleural effusion", return_offsets_mapping=True)
    tokens = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    assert (tokens[0], tokens[-1], tokenizer.pad_token_id) == ("[CLS]", "[SEP]", 0)
    assert encoded["offset_mapping"][1][0] == 0
    assert encoded["offset_mapping"][-2][1] == len("pleural effusion")


@pytest.mark.parametrize("lowercase", [True, False])
def test_a_saved_tokenizer_loads_as_the_same(tmp_path, lowercase):
    tokenizer = train_wordpiece_tokenizer(CAPTIONS, 200, lowercase=lowercase)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded("Naïve T-cells")["input_ids"] == tokenizer("Naïve T-cells")["input_ids"]
    assert ("Naïve" in tokenizer.decode(tokenizer("Naïve")["input_ids"])) is not lowercase


def test_every_process_learns_the_same_vocabulary():
    code = (
        "import sys, json; from medclip_hf.training.tokenizers import train_wordpiece_tokenizer as train;"
        "print(json.dumps(train(json.loads(sys.argv[1]), 120).get_vocab(), sort_keys=True))"
    )
    command = [sys.executable, "-c", code, json.dumps(CAPTIONS)]
    other = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    here = json.dumps(train_wordpiece_tokenizer(CAPTIONS, 120).get_vocab(), sort_keys=True)
    assert other == here


def test_texts_without_a_word_are_refused():
    with pytest.raises(ValueError, match="no word"):
        train_wordpiece_tokenizer(["", "  "], 100)


def test_a_vocabulary_too_small_for_the_characters_is_refused():
    with pytest.raises(ValueError, match="characters of the texts alone take"):
        train_wordpiece_tokenizer(CAPTIONS, 20)
