"""What the page says while it loads a model."""

from collections.abc import Callable
from typing import Any

Node = Callable[..., Any]


def test_bytes_speed_and_the_time_left(in_node: Node) -> None:
    program = """
    import { Progress } from "page/progress.js";
    const progress = new Progress();
    console.log(JSON.stringify(given.map(([at, report]) => progress.line(report, at))));
    """
    total = 330_000_000
    steady = [[1000 * s, {"loaded": 10_000_000 * s, "total": total, "fetched": 10_000_000 * s}] for s in range(12)]
    lines = in_node(program, steady)
    assert lines[0] == "Loading: 0.0 MB of 330 MB"
    assert lines[1] == "Loading: 10 MB of 330 MB · 10 MB/s · 32 s left"
    assert lines[11] == "Loading: 110 MB of 330 MB · 10 MB/s · 22 s left"
    # After a change the speed is that of the last seconds.
    slower = [[11_000 + 1000 * s, {"loaded": 110_000_000 + s * 200_000, "total": total, "fetched": 110_000_000 + s * 200_000}]
              for s in range(1, 7)]  # fmt: skip
    assert in_node(program, steady + slower)[-1] == "Loading: 111 MB of 330 MB · 0.2 MB/s · 18 min left"
    # Stored bytes do not count as speed.
    stored = [[0, {"loaded": 0, "total": total, "fetched": 0}], [900, {"loaded": total, "total": total, "fetched": 0}]]
    assert in_node(program, [*stored, [999, {"waiting": "x"}]]) == [
        "Loading: 0.0 MB of 330 MB",
        "Loading: 330 MB of 330 MB",
        "Waiting: another tab is loading the model",
    ]


def test_whether_the_browser_has_room(in_node: Node) -> None:
    program = """
    import { storageNote } from "page/progress.js";
    console.log(JSON.stringify(given.map((each) => storageNote({ bytes: 330e6, stored: 0, ...each }))));
    """
    notes = in_node(
        program, [{"granted": 200e6}, {"granted": 330e6}, {"granted": 200e6, "stored": 130e6}, {"granted": None}]
    )
    assert notes == [
        "The browser grants 200 MB and the model needs 330 MB: it will work but not be stored.",
        "",
        "",
        "",
    ]
