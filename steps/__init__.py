"""The steps of the chain as functions: `slm.train`, `slm.finetune`, `slm.export`, `slm.quantize`, `slm.evaluate`.

The commands of the same names call these functions with the same options.
"""
