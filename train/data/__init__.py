"""Text to tokens: readers, corpora, tokenizers, token files and the rows drawn from them."""
