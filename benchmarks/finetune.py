"""LoRA fine-tuning of the 270M shape, side by side with transformers and PEFT.

    python benchmarks/finetune.py [--batch 8] [--max-length 256] [--rounds 5] [--steps 6] [--tokens] [--preset gemma3-270m]

Random weights that bfloat16 can hold, as Gemma's are, the same for all; rank 8 on all seven projections, AdamW, clipping. Rows
are random tokens, a prompt that is read and an answer that is learned, of lengths between an eighth of the longest and the
longest. The contenders take turns, each turn a process of its own; two updates warm it up, and those that are timed learn from
the same batches. What is counted is tokens of rows, padding left out.

    slm                          as slm finetune computes it
    transformers + peft          float32 weights under the same autocast, the same batches
    transformers + peft, bf16    weights in bfloat16 and no autocast, the same batches; the adapter in float32
    transformers + peft, mixed   as the first, with rows as they come, not sorted by length

slm keeps freed memory, as `slm finetune` does. The figures are medians of the rounds, with the slowest and the fastest;
processor time is that of all threads. Memory is each process's highest resident size. The last line is one JSON object.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from statistics import median
from typing import Any

WARM_UP = 2
CONTENDERS = ("slm", "transformers + peft", "transformers + peft, bf16", "transformers + peft, mixed")
# Of the two losses before the first update: bfloat16's rounding.
AGREE = 0.02
# Stand for <start_of_turn> and <end_of_turn>.
TURNS = [1, 2]


def main() -> None:
    """Runs the contenders in turn and prints what they did."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="how many are timed in a turn")
    parser.add_argument("--tokens", action="store_true", help="train the rows of the turn tokens too")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--preset", default="gemma3-270m")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        contend(args)
        return
    from slm.core.machine import processor_name, usable_cores
    from slm.core.presets import preset

    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    for number in range(args.rounds):
        for name in CONTENDERS:
            found[name].append(turn(name, sys.argv[1:]))
            print(f"round {number + 1}: {name} {found[name][-1]['tok_s']:,.0f} tokens/s", flush=True)
    rows = {
        name: {
            "tok_s": round(median(each["tok_s"] for each in turns), 1),
            "tok_s_min": round(min(each["tok_s"] for each in turns), 1),
            "tok_s_max": round(max(each["tok_s"] for each in turns), 1),
            "tok_per_cpu_s": round(median(each["tok_per_cpu_s"] for each in turns), 1),
            "padding": round(turns[-1]["padding"], 3),
            "peak_rss_mib": round(max(each["peak_rss_mib"] for each in turns)),
            "first_loss": round(turns[-1]["first_loss"], 4),
        }
        for name, turns in found.items()
    }
    print(f"{processor_name()}, {usable_cores()} cores; medians of {args.rounds} rounds (min – max)")
    for name, row in rows.items():
        print(
            f"{name:28} {row['tok_s']:8,.0f} ({row['tok_s_min']:,.0f} – {row['tok_s_max']:,.0f}) tokens/s  "
            f"{row['tok_per_cpu_s']:8,.0f} a second of processor time  {row['padding']:6.1%} padding  "
            f"{row['peak_rss_mib']:7,} MiB  first loss {row['first_loss']:.4f}"
        )
    ours, same = rows["slm"]["first_loss"], rows["transformers + peft"]["first_loss"]
    if abs(ours - same) > AGREE:
        raise SystemExit(f"the two do not compute the same: {ours} and {same}")
    best = max(row["tok_s"] for name, row in rows.items() if name != "slm")
    ratio = rows["slm"]["tok_s"] / best
    ratio_cpu = rows["slm"]["tok_per_cpu_s"] / max(row["tok_per_cpu_s"] for name, row in rows.items() if name != "slm")
    print(f"ours over the fastest of theirs: {ratio:.2f}; by processor time {ratio_cpu:.2f}")
    print(
        json.dumps(
            {
                "preset": args.preset,
                "parameters": preset(args.preset).parameter_count(),
                "batch": args.batch,
                "max_length": args.max_length,
                "dtype": args.dtype,
                "turn_tokens": args.tokens,
                "processor": processor_name(),
                "cores": usable_cores(),
                "load_average": round(os.getloadavg()[0], 1),
                "ratio": round(ratio, 3),
                "ratio_cpu": round(ratio_cpu, 3),
                "ratio_same": round(rows["slm"]["tok_s"] / rows["transformers + peft"]["tok_s"], 3),
                **rows,
            }
        )
    )


def turn(name: str, arguments: list[str]) -> dict[str, float]:
    """Has a contender make its updates in a process of its own; returns what it says of them."""
    command = [sys.executable, __file__, *arguments, "--contender", name]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, float] = json.loads(ended.stdout.splitlines()[-1])
    return result


def contend(args: argparse.Namespace) -> None:
    """Is a contender: makes its updates and says what they took."""
    import torch

    from slm.core.machine import freed_memory_kept
    from slm.core.nn import CausalLM
    from slm.core.presets import preset
    from slm.core.processes import peak_rss_mib
    from slm.finetune.batches import alone, collate, epoch_batches

    torch.manual_seed(0)
    config = preset(args.preset)
    model = CausalLM(config)
    model.init_weights(torch.Generator().manual_seed(0))
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    updates = WARM_UP + args.steps
    examples = rows(config.vocab_size, args.batch * updates, args.max_length)
    packed = alone(examples)
    if args.contender.endswith("mixed"):
        batches = [collate(packed[i : i + args.batch]) for i in range(0, len(packed), args.batch)]
    else:
        batches = epoch_batches(packed, args.batch, random.Random("0 0"))  # the order of an slm run's first epoch
    update = ours(model, examples, args) if args.contender == "slm" else theirs(model, batches, args)
    del model
    losses, seconds, cpu = [], 0.0, 0.0
    with freed_memory_kept() if args.contender == "slm" else nullcontext():
        for number in range(updates):
            began, cpu_began = time.perf_counter(), time.process_time()
            losses.append(update())
            if number >= WARM_UP:
                seconds += time.perf_counter() - began
                cpu += time.process_time() - cpu_began
    timed = batches[WARM_UP:]
    tokens = sum(int((batch.input_ids != 0).sum()) for batch in timed)
    print(
        json.dumps(
            {
                "tok_s": tokens / seconds,
                "tok_per_cpu_s": tokens / cpu,
                "padding": 1 - tokens / sum(batch.input_ids.numel() for batch in timed),
                "first_loss": losses[0],
                "peak_rss_mib": peak_rss_mib(),
            }
        )
    )


def rows(vocab_size: int, count: int, longest: int) -> list[Any]:
    """Returns random rows; no token of theirs is 0, which is padding."""
    from slm.finetune.examples import Example

    draw = random.Random(0)
    found = []
    for _ in range(count):
        size = draw.randint(longest // 8, longest)
        ids = [draw.randrange(3, vocab_size) for _ in range(size)]
        ids[0], ids[1 + size // 3] = TURNS
        found.append(Example.ending(ids, draw.randint(size // 4, size // 2)))
    return found


def ours(model: Any, examples: list[Any], args: argparse.Namespace) -> Callable[[], float]:
    """Returns an update as `slm finetune` makes it."""
    from pathlib import Path

    import torch

    from slm.finetune.adapter import attach
    from slm.finetune.batches import alone
    from slm.finetune.fit import Fit, Trainable
    from slm.finetune.frozen import lighten
    from slm.finetune.material import Answers
    from slm.finetune.settings import FinetuneSettings
    from slm.finetune.state import Standing
    from slm.train.precision import Precision

    settings = FinetuneSettings(batch_size=args.batch, epochs=1, learning_rate=1e-4, max_length=args.max_length)
    adapter = attach(model, settings, Path(), TURNS if args.tokens else [])
    precision = Precision(torch.bfloat16 if args.dtype == "bfloat16" else None, scale_loss=False)
    tunable = adapter.get_base_model()
    lighten(tunable, precision.autocast)
    trained = {name: p for name, p in adapter.named_parameters() if p.requires_grad}
    material = Answers(alone(examples), ())
    fit = Fit(Trainable(tunable, trained), material, settings, precision, Standing(course={"settings": {}}))
    return lambda: float(fit.update(lambda: None)[0]["loss"])


def theirs(model: Any, batches: list[Any], args: argparse.Namespace) -> Callable[[], float]:
    """Returns an update of transformers' model with PEFT's adapter, its own loss and torch's fused AdamW."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    from slm.finetune.settings import PROJECTIONS

    config = model.config
    fields = {k: v for k, v in config.to_hf().items() if k not in ("architectures", "model_type", "dtype")}
    hf_config = Gemma3TextConfig(**fields)
    hf_config._attn_implementation = "sdpa"
    base = Gemma3ForCausalLM(hf_config)
    base.load_state_dict(dict(model.named_parameters()), strict=False)
    base.tie_weights()
    half = args.dtype == "bfloat16"
    whole = args.contender.endswith("bf16") and half
    base = base.bfloat16() if whole else base.float()
    peft = get_peft_model(
        base,
        LoraConfig(
            r=8,
            lora_alpha=16,
            target_modules=list(PROJECTIONS),
            trainable_token_indices=TURNS if args.tokens else None,
            task_type="CAUSAL_LM",
        ),
    ).train()
    parameters = [parameter for parameter in peft.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)
    left = iter(batches)

    def update() -> float:
        batch = next(left)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half and not whole):
            loss = peft(
                input_ids=batch.input_ids,
                attention_mask=(batch.input_ids != 0).long(),
                labels=batch.labels,
                shift_labels=batch.labels,
                use_cache=False,
            ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return float(loss.item())

    return update


if __name__ == "__main__":
    main()
