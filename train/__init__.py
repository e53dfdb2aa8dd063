"""From text to a checkpoint: tokenizer, token files, recipes and the loop. `slm.train.run.train` does it all."""
