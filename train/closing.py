"""Sample texts of the best checkpoint, at the end of a run."""

import time
from dataclasses import dataclass
from pathlib import Path

from slm.core.errors import SlmError
from slm.core.nn import load_checkpoint
from slm.core.tokenizer import Tokenizer
from slm.train.data.dataset import Dataset, open_dataset
from slm.train.prepare import CONFIG, DATA
from slm.train.recipe import load_recipe
from slm.train.samples import TEMPERATURE, continue_prompts

# Number of texts, and the time limit for all of them: large models are slow on a CPU.
_TEXTS = 3
_SECONDS = 10.0
# Length of the prompt taken from the held-out text, in tokens.
_OPENING = 12


@dataclass(frozen=True)
class Sample:
    """A sample text.

    Attributes:
        prompt: A prompt of the recipe, or the opening of the held-out text.
        text: Prompt and continuation.
        temperature: Sampling temperature.
        seed: Sampling seed.
    """

    prompt: str
    text: str
    temperature: float
    seed: int


def closing_samples(run: Path, checkpoint: Path) -> list[Sample]:
    """Continues the recipe's prompts and the opening of the held-out text, which resembles the training text.

    Returns no text if memory does not suffice for another copy of the model, and fewer if time runs out.

    Args:
        run: A finished run.
        checkpoint: Its best checkpoint, loaded on the CPU.
    """
    until = time.perf_counter() + _SECONDS
    found: list[Sample] = []
    try:
        recipe = load_recipe(run / CONFIG)
        dataset = open_dataset(run / DATA)
        model, tokenizer = load_checkpoint(checkpoint), Tokenizer.load(checkpoint)
        prompts = dict.fromkeys(
            (*recipe.evaluation.prompts[: _TEXTS - 1], _opening(dataset, model.config.stop_token_ids))
        )
        for prompt in prompts:
            left = until - time.perf_counter()
            if left <= 0:
                break
            (text,) = continue_prompts(
                model, tokenizer, [prompt], recipe.evaluation.sample_tokens, recipe.seed, seconds=left
            )
            found.append(Sample(prompt, text, TEMPERATURE, recipe.seed))
    except (SlmError, MemoryError):  # the run is complete with or without samples
        pass
    except RuntimeError as error:  # PyTorch's allocator on the CPU has no exception of its own
        if "can't allocate memory" not in str(error):
            raise
    return found


def _opening(dataset: Dataset, ends: tuple[int, ...]) -> str:
    """Returns the first words of the held-out text."""
    ids = [int(token) for token in dataset.validation.ids[: 4 * _OPENING]]
    begins = next((place for place, token in enumerate(ids) if token not in ends), 0)
    stops = next((place for place in range(begins, len(ids)) if ids[place] in ends), len(ids))
    text = dataset.tokenizer.decode(ids[begins : min(stops, begins + _OPENING)])
    words, _, _ = text.rstrip("\ufffd").rpartition(" ")  # drops the last word, which may be cut within a character
    return (words or text).strip()
