"""Comparison of the two ways to read a head in halves (`slm.export.graph.halves`): whole, and upper halves with candidates.

The whole head is compared with PyTorch (`slm.export.parity`), so this comparison also ties the other one to PyTorch.
"""

import numpy as np

from slm.core.contract import head_candidates
from slm.core.errors import SlmError
from slm.core.manifest import Bundle
from slm.core.progress import Progress
from slm.runtime.decoder import OnnxDecoder
from slm.runtime.head import both_ways

# The largest difference of a candidate's logits, in units of their deviation: 1e-6 where the kernel rounds activations by block
# (AVX-512 VNNI), and 1/16 of the rounding in other layers elsewhere.
CANDIDATE_TOLERANCE = 0.02
# The largest root mean square of the other logits' differences: 4 of 8 bits leave 0.1 to 0.15 of the deviation.
OTHER_TOLERANCE = 0.3
_PROMPT, _STEPS = 8, 16


def check_head(bundle: Bundle, progress: Progress) -> None:
    """Compares the logits of single-token steps from halves with those of the whole head.

    Raises:
        SlmError: If a difference is above its limit.
    """
    decoder = OnnxDecoder(bundle)
    vocab, count = decoder.vocab_size, _PROMPT + min(_STEPS, decoder.context - _PROMPT)
    ids = np.random.default_rng(0).integers(0, vocab, count).tolist()
    decoder.read(ids[:_PROMPT])
    candidates, worst, others = head_candidates(vocab), 0.0, 0.0
    for halves, whole in both_ways(decoder, ids[_PROMPT:]):
        off = np.abs(halves - whole) / whole.std()
        # As many tokens as there are candidates must agree. After random tokens, hundreds of logits can lie so close together
        # that the likeliest ones are not all candidates.
        worst = float(np.maximum(worst, np.partition(off, candidates - 1)[candidates - 1]))
        others = float(np.maximum(others, np.sqrt(np.mean(off**2))))
    for what, found, limit in (
        ("candidates", worst, CANDIDATE_TOLERANCE),
        ("other tokens", others, OTHER_TOLERANCE),
    ):
        if not found <= limit:
            raise SlmError(
                f"the head in halves does not match the whole head: the logits of {what} differ by {found:.2g}, limit {limit}",
                "quantize the bundle again",
            )
    progress.note(f"head in halves: candidates differ by {worst:.1g} from the whole head, other tokens by {others:.2g}")
