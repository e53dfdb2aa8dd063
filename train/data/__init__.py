"""From text to tokens: corpora, tokenizers, token files and the windows drawn from them."""
