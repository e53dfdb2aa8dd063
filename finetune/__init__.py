"""LoRA fine-tuning on rows of text, prompts or instructions, and merging the adapter into its base."""
