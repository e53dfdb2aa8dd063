"""Choice of a plan: what the settings leave open is decided by measurement on the calibration text."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from slm.core.manifest import Bundle, Scheme
from slm.core.progress import Progress
from slm.export.graph.builder import Array
from slm.quantize.cache import cache_steps
from slm.quantize.cache_choice import attention_times, faster
from slm.quantize.exact import BLOCK_SIZE as GRID_BLOCK_SIZE
from slm.quantize.exact import share_on_grid
from slm.quantize.frequent import frequent_tokens
from slm.quantize.halves import mean_hidden, quantize_halves
from slm.quantize.layerwise import with_gptq
from slm.quantize.linears import EMBEDDING, Linear
from slm.quantize.plan import (
    INT4,
    INT8,
    QuantizationPlan,
    Schemes,
    coarser_schemes,
    preferred_schemes,
    schemes_of,
    with_four_bit_tables,
    with_frequent,
    with_half_scales,
)
from slm.quantize.quantizer import Quantizer
from slm.quantize.refinement import Refinement, refined
from slm.quantize.search import Budget, Candidates, Choice, sensitivities
from slm.quantize.settings import Prefer
from slm.quantize.smoothquant import smoothquant
from slm.quantize.texts import TokenRows
from slm.quantize.trained import trained_plan

# Calibration rows for trying smoothing, for the sensitivity of each layer, and for trying mixed precision; tokens in a row.
_SMOOTHING_ROWS, _SENSITIVITY_ROWS, _TOGETHER_ROWS, _ROW_TOKENS = 1, 2, 4, 256
# The share of output channels on a grid from which the whole product counts as being on a grid.
_KEPT_SHARE = 0.5
# The KL divergence that INT4 aims for, in nats, as the sum of the layers' divergences. The measured divergence is higher
# (docs/quantization.md).
_FINE_KL_NATS: Mapping[Prefer, float] = {"auto": 0.02, "speed": 0.02, "quality": 0.012}


def decide(quantizer: Quantizer, refinement: Refinement | None = None) -> QuantizationPlan:
    """Chooses the plan: schemes, steps of the caches, smoothing, and for INT4 the bits of each layer.

    Args:
        quantizer: The quantizer.
        refinement: For INT4, the training of the plan; None for no training.
    """
    settings, source = quantizer.settings, quantizer.source
    trained = trained_plan(quantizer)
    if trained is None:
        schemes = schemes_of(quantizer.linears, preferred_schemes(settings), settings.block_size)
        plan = QuantizationPlan(schemes, settings.rounding_method)
    else:
        plan = trained
    schemes = on_device(dict(plan.schemes), source)
    plan = _with_caches(quantizer, replace(plan, schemes=schemes, device=source.manifest.device))
    if trained is not None:
        return plan
    if settings.head == "halves":
        plan = _with_halves(quantizer, plan)
    exact = exact_products(quantizer.weights, quantizer.layers, plan.schemes, quantizer.progress)
    plan = replace(plan, exact=exact)
    if settings.smooth is not False and len(exact) < len(quantizer.layers):
        plan = _smoothed(quantizer, plan)
    if settings.precision == "int4":
        quantizer.reference.close()
        plan = _with_mixed_precision(quantizer, plan)
    if refinement is not None:
        plan = refined(quantizer, plan, refinement)
    return plan


def _with_caches(quantizer: Quantizer, plan: QuantizationPlan) -> QuantizationPlan:
    """Returns the plan with the type of caches that the settings ask for, or whose attention is faster on this processor."""
    cache, note = quantizer.settings.cache_type, quantizer.progress.note
    if cache is None:
        attention = attention_times(quantizer.float32, quantizer.scratch)
        cache = faster(attention)
        times = " and ".join(f"{1e6 * seconds:.0f} µs with {each}" for each, seconds in attention.items())
        note(f"{cache} caches: a step with four attention layers takes {times} caches")
        plan = replace(plan, attention=attention)
    steps = cache_steps(quantizer.float32, quantizer.calibration, quantizer.progress) if cache == "int8" else {}
    return replace(plan, cache=cache, cache_steps=steps)


def _with_halves(quantizer: Quantizer, plan: QuantizationPlan) -> QuantizationPlan:
    """Returns the plan with the tied table in halves."""
    scheme = plan.schemes[EMBEDDING].model_copy(update={"halves": True})
    mean = mean_hidden(quantizer.float32, quantizer.calibration, quantizer.progress)
    table = quantize_halves(quantizer.weights[f"{EMBEDDING}.weight"], scheme, mean)
    return replace(plan, schemes={**plan.schemes, EMBEDDING: scheme}, rounded={EMBEDDING: table})


def on_device(schemes: dict[str, Scheme], source: Bundle) -> dict[str, Scheme]:
    """Returns the schemes for a device. On CUDA, scales are float16 except for products that overflow float16."""
    manifest = source.manifest
    if manifest.device == "cpu":
        return schemes
    return with_half_scales(schemes, manifest.ranges.float32 if manifest.ranges else ())


def exact_products(
    tensors: Mapping[str, Array], layers: Sequence[Linear], schemes: Schemes, progress: Progress
) -> frozenset[str]:
    """Returns the paths of the products whose weights lie on grids that their schemes store exactly.

    Prints a note if there are such products, or if `--int4 --block-size 32` would keep products exactly.
    """
    exact = frozenset(
        linear.path
        for linear in layers
        if share_on_grid(tensors[f"{linear.path}.weight"], schemes[linear.path]) >= _KEPT_SHARE
    )
    if exact:
        progress.note(
            f"{len(exact)} of {len(layers)} products lie on a grid that {schemes[min(exact)].name} stores exactly; their"
            " weights keep their values and are not smoothed"
        )
    four_bits = Scheme(bits=4, block_size=GRID_BLOCK_SIZE, zero_points=True)
    missed = [
        linear
        for linear in layers
        if linear.path not in exact
        and linear.inputs % GRID_BLOCK_SIZE == 0
        and share_on_grid(tensors[f"{linear.path}.weight"], four_bits) >= _KEPT_SHARE
    ]
    if missed:
        progress.note(
            f"{len(missed)} of {len(layers)} products lie on a 4-bit grid in blocks of {GRID_BLOCK_SIZE}, as in Q4_0;"
            f" --int4 --block-size {GRID_BLOCK_SIZE} keeps their weights exactly"
        )
    return exact


def _smoothed(quantizer: Quantizer, plan: QuantizationPlan) -> QuantizationPlan:
    """Returns the plan with smoothing if the settings ask for it or if it reduces the KL divergence."""
    config = quantizer.source.config
    smoothed = replace(plan, smoothing=smoothquant(quantizer.weights, config, quantizer.activations, kept=plan.exact))
    if quantizer.settings.smooth:
        return smoothed
    text = quantizer.calibration.first(_SMOOTHING_ROWS, _ROW_TOKENS)
    method = "searched" if plan.method == "gptq" else plan.method  # GPTQ takes long
    without, with_smoothing = (quantizer.kl_nats(replace(each, method=method), text) for each in (plan, smoothed))
    quantizer.progress.note(f"KL divergence with smoothing {with_smoothing:.4f} nats, without {without:.4f}")
    return smoothed if with_smoothing < without else plan


def _with_mixed_precision(quantizer: Quantizer, plan: QuantizationPlan) -> QuantizationPlan:
    """Rounds to few bits, then gives more to the most sensitive weights, within the budget of the settings."""
    settings, calibration = quantizer.settings, quantizer.calibration
    # GPTQ fits the rows that it reads, so its KL divergence is measured on other rows.
    held_out = 0 if settings.target_kl_nats is None else min(_TOGETHER_ROWS, len(calibration.rows) // 2)
    if settings.tables != "eight":
        plan = _with_four_bit_tables(quantizer, plan, calibration.after(held_out))
    if plan.method == "gptq":
        coarser = {}
        if settings.block_size is None and (settings.target_bytes is not None or settings.target_kl_nats is not None):
            choosable = [linear for linear in quantizer.layers if linear.path not in plan.exact]
            coarser = coarser_schemes(choosable, plan.schemes)
        plan = with_gptq(quantizer, plan, calibration.after(held_out), coarser)
    if settings.prefer == "size" and settings.target_bytes is None and settings.target_kl_nats is None:
        return plan
    plan, candidates = _candidates(quantizer, plan)

    def kl_nats(schemes: Schemes) -> float:
        found = quantizer.kl_nats(plan.with_schemes(schemes), calibration.first(max(1, held_out), _ROW_TOKENS))
        count = sum(scheme.bits == 8 for scheme in schemes.values())
        quantizer.progress.note(f"{count} of {len(schemes)} products in 8 bits: KL divergence {found:.4f} nats")
        return found

    if settings.target_bytes is not None:
        schemes = candidates.within_bytes(
            settings.target_bytes, lambda schemes: quantizer.bytes(plan.with_schemes(schemes))
        )
    elif settings.target_kl_nats is not None:
        schemes = candidates.within_kl(settings.target_kl_nats, kl_nats)
    else:
        schemes = candidates.choose(Budget(kl_nats=_FINE_KL_NATS[settings.prefer]))
    return plan.with_schemes(schemes)


def _with_four_bit_tables(quantizer: Quantizer, plan: QuantizationPlan, text: TokenRows) -> QuantizationPlan:
    """Returns the plan with tables in 4 bits, and the rows of frequent tokens of a text in 8 bits."""
    (head,) = (linear for linear in quantizer.linears if linear.role == "head")
    weight = quantizer.weights[f"{head.path}.weight"]
    frequent = frequent_tokens(quantizer.float32, weight, head, text, quantizer.progress)
    tables = [linear for linear in quantizer.linears if linear.role != "layer"]
    schemes = on_device(schemes_of(tables, with_four_bit_tables(INT4)), quantizer.source)
    chosen = {path: with_frequent(scheme, frequent.enough) for path, scheme in schemes.items()}
    quantizer.progress.note(
        f"{frequent.enough:,} of {head.outputs:,} tokens are {1 - frequent.others[frequent.enough]:.1%} of the calibration"
        " text and of its predictions"
    )
    return replace(plan.with_schemes({**plan.schemes, **chosen}), frequent=frequent)


def _candidates(quantizer: Quantizer, plan: QuantizationPlan) -> tuple[QuantizationPlan, Candidates]:
    """Returns the plan with sensitivities, and the choices of every weight with fewer than eight bits.

    A weight can get eight bits, unless the settings ask for four in tables. A table in 4 bits can also get another number of
    rows of frequent tokens in 8 bits.
    """
    few_bits = [linear for linear in quantizer.linears if plan.schemes[linear.path].bits < 8]
    text = quantizer.calibration.first(_SENSITIVITY_ROWS, _ROW_TOKENS)
    plain = plan.with_schemes({path: with_frequent(scheme, 0) for path, scheme in plan.schemes.items()})
    plan = replace(plan, sensitivity=sensitivities(quantizer, plain, few_bits, text))
    # A weight that lies on a 4-bit grid keeps four bits, because eight bits would be less exact.
    choosable = [linear for linear in few_bits if linear.path not in plan.exact]
    eight = replace(INT8["auto"], head=INT4.head, lookup=INT4.lookup)
    high = on_device(schemes_of(choosable, eight), quantizer.source)
    choices: dict[str, list[Choice]] = {}
    for linear in few_bits:
        path, harm = linear.path, plan.sensitivity[linear.path]
        choices[path] = [Choice(plain.schemes[path], harm)]
        if linear not in choosable:
            continue
        if path in plan.coarser:  # the divergence of a small error is in proportion to its square
            choices[path].append(Choice(plan.coarser[path].scheme, harm * max(1.0, plan.coarser[path].error)))
        if linear.role != "layer" and plan.frequent is not None:
            # Measured on Gemma 3 270M: the divergence falls in proportion to the share of the other tokens.
            choices[path] += [
                Choice(with_frequent(plain.schemes[path], count), harm * share)
                for count, share in plan.frequent.others.items()
            ]
        if linear.role == "layer" or quantizer.settings.tables != "four":
            choices[path].append(Choice(high[path], 0.0))
    return plan, Candidates(quantizer.linears, plan.schemes, choices)
