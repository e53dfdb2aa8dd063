"""LoRA fine-tuning on rows of text, prompts or instructions, and merging the adapter into its base.

`slm.finetune(...)`, the package itself, fine-tunes a checkpoint: `slm.steps.finetuning.finetune`.
"""
