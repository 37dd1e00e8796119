"""A BERT tokenizer from the captions themselves, for runs that start from nothing."""

from collections.abc import Iterable

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import BertTokenizer

_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def train_wordpiece_tokenizer(
    texts: Iterable[str],
    vocab_size: int = 30522,
    lowercase: bool = True,
    *,
    min_frequency: int = 2,
    max_length: int = 512,
) -> BertTokenizer:
    """A WordPiece tokenizer with BERT's cleaning, splitting and special tokens, [PAD] being 0.

    The vocabulary holds every character of the texts, so that no word of theirs becomes [UNK], and then the most
    frequent pieces. The same texts give the same vocabulary, in whatever process.

    Args:
        texts: held in memory while the vocabulary is learned; a sample of a large corpus does.
        vocab_size: at most; the special tokens count.
        lowercase: lower the case and strip accents, as uncased BERT does.
        min_frequency: a piece must occur this often.
        max_length: in tokens, what the tokenizer truncates to when asked to without a length.

    Raises:
        ValueError: no text holds a word, or `vocab_size` leaves no room for all characters.
    """
    texts = list(texts)
    normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    splitter = pre_tokenizers.BertPreTokenizer()
    # The trainer would number these as its hash table yields them, and break ties by number: each time another way.
    continued = sorted(
        {"##" + char for text in texts for word in _words(text, normalizer, splitter) for char in word[1:]}
    )
    tokenizer = Tokenizer(models.WordPiece(unk_token=_SPECIAL[1]))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[*_SPECIAL, *continued],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    vocabulary = tokenizer.get_vocab()
    if len(vocabulary) == len(_SPECIAL):
        raise ValueError("the texts hold no word to learn a vocabulary from.")
    if len(vocabulary) > vocab_size:
        raise ValueError(f"vocab_size is {vocab_size}, but the characters of the texts alone take {len(vocabulary)}.")
    ordered = dict(sorted(vocabulary.items(), key=lambda item: item[1]))
    return BertTokenizer(vocab=ordered, do_lower_case=lowercase, model_max_length=max_length)


def _words(text: str, normalizer: normalizers.Normalizer, splitter: pre_tokenizers.PreTokenizer) -> list[str]:
    return [word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))]
