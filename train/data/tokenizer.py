"""Tokenizers: GPT-2's byte-pair encoding through tiktoken, or one learned from the user's text."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from slm.core.chat import tokenizer_config
from slm.core.errors import SlmError
from slm.core.text.cuts import cuts_at_spaces
from slm.core.tokenizer import END_OF_TEXT, SPECIAL_TOKENS, TOKENIZER_FILE, Tokenizer

# SHA-256 of GPT-2's tokens in order, in the spelling of byte-level vocabularies, separated by line breaks.
_GPT2_TOKENS_SHA256 = "3a1f1c010d179f036be1992bc14b861e326341438633869c694dc4dccfe153d3"


def resolve_tokenizer(choice: str, texts: Iterable[str], vocab_size: int, max_length: int) -> Tokenizer:
    """Returns the tokenizer that a recipe or `--tokenizer` asks for.

    Args:
        choice: "gpt2", "bpe" to learn one from `texts`, or the path of a `tokenizer.json`.
        texts: Documents to learn from; only "bpe" reads them.
        vocab_size: The model's vocabulary, special tokens included.
        max_length: The longest context, in tokens.

    Raises:
        SlmError: When GPT-2's files are not available, or the vocabulary does not fit the model.
    """
    if choice == "gpt2":
        tokenizer = gpt2(max_length)
    elif choice == "bpe":
        tokenizer = train_bpe(texts, vocab_size, max_length)
    else:
        tokenizer = from_file(Path(choice), max_length)
    check_vocabulary(tokenizer.vocab_size, vocab_size)
    return tokenizer


def is_choice(choice: str, tokenizer: Tokenizer, max_length: int) -> bool:
    """Returns whether a tokenizer is the one that a recipe or `--tokenizer` asks for; any tokenizer satisfies "bpe".

    Raises:
        SlmError: When the file of the tokenizer cannot be read.
    """
    if choice == "bpe":
        return True
    return is_gpt2(tokenizer) if choice == "gpt2" else from_file(Path(choice), max_length).sha256 == tokenizer.sha256


def is_gpt2(tokenizer: Tokenizer) -> bool:
    """Returns whether a tokenizer is GPT-2's, without its files."""
    tokens = tokenizer.backend.get_vocab(with_added_tokens=False)
    text = "\n".join(sorted(tokens, key=tokens.__getitem__))
    added = tokenizer.vocab_size - len(tokens)
    same = hashlib.sha256(text.encode()).hexdigest() == _GPT2_TOKENS_SHA256 and added == len(SPECIAL_TOKENS)
    return same and cuts_at_spaces(tokenizer)


def check_vocabulary(tokens: int, vocab_size: int) -> None:
    """Checks that a tokenizer's ids fit a model.

    Raises:
        SlmError: When they do not.
    """
    if tokens > vocab_size:
        raise SlmError(
            f"the tokenizer has {tokens:,} tokens and the model's vocabulary {vocab_size:,}",
            f"--set {vocabulary_for(tokens)}",
        )


def vocabulary_for(tokens: int) -> str:
    """Returns the `--set` value of a vocabulary with room for a number of tokens: a multiple of 64, for fast products."""
    return f"model.vocab_size={-(-tokens // 64) * 64}"


def train_bpe(texts: Iterable[str], vocab_size: int, max_length: int) -> Tokenizer:
    """Learns a byte-level BPE (arXiv:1508.07909) of `vocab_size` tokens, or fewer if the text has no more pairs."""
    backend = Backend(models.BPE())
    _byte_level(backend)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return _finished(backend, max_length)


def gpt2(max_length: int) -> Tokenizer:
    """Returns GPT-2's 50,257 tokens followed by the turn tokens.

    Raises:
        SlmError: When tiktoken finds them neither in its cache nor over the network.
    """
    import tiktoken

    try:
        encoding = tiktoken.get_encoding("gpt2")
    except Exception as error:  # an error of requests or urllib3, whichever tiktoken uses
        raise SlmError(
            f"GPT-2's vocabulary could not be downloaded ({type(error).__name__})",
            "point TIKTOKEN_CACHE_DIR at a directory that holds it, use --tokenizer FILE, or --tokenizer bpe to learn one",
        ) from None
    ranks = encoding._mergeable_ranks
    return _finished(_from_ranks(ranks, encoding._pat_str), max_length)


def from_file(path: Path, max_length: int) -> Tokenizer:
    """Loads a `tokenizer.json`, and adds the turn tokens if it lacks them.

    Raises:
        SlmError: When it is missing or not a tokenizer.
    """
    path = path.expanduser()
    if not (path / TOKENIZER_FILE if path.is_dir() else path).is_file():
        raise SlmError(
            f"tokenizer not found: {path}",
            f"name gpt2, bpe, or a {TOKENIZER_FILE}; every checkpoint, bundle and prepared dataset holds one",
        )
    return _finished(Tokenizer.load(path).backend, max_length)


def _from_ranks(ranks: Mapping[bytes, int], pattern: str) -> Backend:
    """Turns tiktoken's ranks into a BPE model.

    A token's rank is the order of its merge. Encoding the token with the earlier merges leaves the pair that was merged.
    """
    to_text = _byte_to_text()
    vocabulary = {"".join(to_text[b] for b in token): rank for token, rank in ranks.items()}
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            left, right = _last_pair(ranks, token, rank)
            merges.append(("".join(to_text[b] for b in left), "".join(to_text[b] for b in right)))
    backend = Backend(models.BPE(vocab=vocabulary, merges=merges))
    _byte_level(backend, pattern)
    return backend


def _last_pair(ranks: Mapping[bytes, int], token: bytes, rank: int) -> tuple[bytes, bytes]:
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], rank))
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts[0], parts[1]


def _byte_to_text() -> list[str]:
    """Returns the character that stands for each byte in a byte-level vocabulary: itself if printable, else from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


def _byte_level(backend: Backend, pattern: str | None = None) -> None:
    if pattern is None:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    backend.decoder = decoders.ByteLevel()


def _finished(backend: Backend, max_length: int) -> Tokenizer:
    """Adds missing special tokens, and a rule that puts end-of-text, which also begins a text, before every prompt."""
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    end_of_text = backend.token_to_id(END_OF_TEXT)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", pair=f"{END_OF_TEXT} $A $B", special_tokens=[(END_OF_TEXT, end_of_text)]
    )
    backend.no_truncation()
    backend.no_padding()
    return Tokenizer(backend, tokenizer_config(max_length))
