"""From text to a checkpoint: tokenizer, token files, recipes and the loop.

`slm.train(...)`, the package itself, trains a model: `slm.steps.training.train`.
"""
