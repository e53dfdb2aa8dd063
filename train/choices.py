"""Names that a recipe chooses between, apart from the code that uses them: a recipe is checked before PyTorch is imported."""

from typing import Literal

Sampler = Literal["random", "packed", "best_fit"]
PrecisionName = Literal["auto", "float32", "bfloat16", "float16"]
ParallelName = Literal["ddp", "fsdp"]
LogName = Literal["tensorboard", "wandb", "mlflow"]
