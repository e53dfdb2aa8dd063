"""Trimming of vocabularies: a checkpoint with only the tokens that a text needs.

`needs` lists the tokens that a token is made of, `choice` selects tokens by their counts, `tokenizer` rebuilds the tokenizer,
`texts` counts tokens and compares both tokenizers on text, and `checkpoint` writes the result.
"""
