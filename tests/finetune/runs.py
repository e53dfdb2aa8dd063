"""Quick runs of fine-tuning: their rows, their settings, and the files that they leave."""

from slm.finetune.settings import FinetuneSettings

WORDS = ("one", "two", "red", "blue", "cat", "dog", "sun", "sea", "cup", "hat")
PAIRS = [{"instruction": f"Say {word}.", "output": f"{word}!"} for word in WORDS]
QUICK = FinetuneSettings(rank=4, epochs=2, batch_size=4)
FILES = ["adapter_config.json", "adapter_model.safetensors", "config.yaml", "loss.png", "metrics.jsonl", "slm.json"]
