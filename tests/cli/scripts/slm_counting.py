"""`slm ARGUMENTS` that prints "token read" on standard error when the 30th token is chosen.

With --json nothing else shows that a text has begun before it ends.
"""

import sys
from typing import Any

from slm.cli.main import main
from slm.runtime import sampling

choose, count = sampling.Sampler.choose, 0


def counted(self: sampling.Sampler, logits: Any) -> int:
    global count
    count += 1
    if count == 30:
        sys.stderr.write("token read\n")
        sys.stderr.flush()
    return choose(self, logits)


sampling.Sampler.choose = counted  # type: ignore[method-assign]
main(sys.argv[1:])
