"""The mutants fit today's kernels, compile, and are wrong: in Triton's interpreter or on the emulator, where the real
kernels are right."""

from __future__ import annotations

import ast
import contextlib
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kernels import __main__ as cli
from kernels import bundle, edits, mutants, specs
from kernels.edits import EditError, edited
from kernels.mutants import COMBINE_MUTANTS, HOPPER_MUTANTS, MUTANTS, PORTABLE_MUTANTS, SLOWED, Mutant, Slowed
from kernels.tests import interpreter
from kernels.tests.problem import Array, Problem, inputs
from kernels.tests.test_forward import causal, check
from kernels.tests.test_forward_hopper import noticed

ARCH = "sm_90a"


def source(entry: Mutant | Slowed) -> str:
    return (edits.KERNELS / f"{entry.kernel}.py").read_text()


# --- the tables ---


@pytest.mark.parametrize("entry", [*MUTANTS, *SLOWED], ids=lambda entry: entry.name)
def test_the_edits_fit_the_kernel(entry: Mutant | Slowed) -> None:
    text = edited(source(entry), entry.edits)
    ast.parse(text)
    assert (text != source(entry)) == bool(entry.edits)
    for other in ("", 2 * source(entry)):  # none or two places for each edit
        with pytest.raises(EditError) if entry.edits else contextlib.nullcontext():
            edited(other, entry.edits)


def test_names_are_unique() -> None:
    for table in (MUTANTS, SLOWED):
        assert len({entry.name for entry in table}) == len(table)
    assert min(len(PORTABLE_MUTANTS), len(HOPPER_MUTANTS)) >= 20


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_variants_exist_and_have_the_kernel(mutant: Mutant) -> None:
    found = mutant.specs(ARCH)
    assert tuple(spec.name for spec in found) == mutant.variants
    for spec in found:
        assert any(f"kernels.{mutant.kernel}" in launch.sources for launch in spec.launches)


def test_slower_ones_answer_what_the_real_one_does() -> None:
    real = next(spec for spec in specs.specs(ARCH) if spec.name == mutants.CLASSIC)
    for slowed in SLOWED:
        (spec,) = slowed.specs(ARCH)
        assert (spec.name, spec.priority, spec.when, spec.requires) == (
            real.name,
            real.priority,
            real.when,
            real.requires,
        )
        assert spec.launches == real.launches or slowed.shape


# --- machine code ---


def test_bundles_of_mutants_and_of_the_real_kernel(tmp_path: Path) -> None:
    chosen = [next(entry for entry in MUTANTS if entry.name == "portable_value_from_key"), SLOWED[0]]
    rows, failures = mutants.write(chosen, ARCH, tmp_path, 2)
    assert not failures
    committed = bundle.unpack(cli.bundle_path(ARCH).read_bytes())
    for entry, row in zip(chosen, rows, strict=True):
        made = bundle.unpack((tmp_path / row["file"]).read_bytes())
        assert row["variants"] == [spec.name for spec in entry.specs(ARCH)] == list(made.variants())
        for name, variant in made.variants().items():
            real = committed.variants()[name]
            assert {key: variant[key] for key in variant if key != "launches"} == {
                key: real[key] for key in real if key != "launches"
            }
            same = made.member(variant["launches"][0]) == committed.member(real["launches"][0])
            assert same == (entry.name == "same")


def test_what_cannot_be_built_is_a_failure_that_names_it(tmp_path: Path) -> None:
    broken = replace(PORTABLE_MUTANTS[0], name="broken", edits=(edits.swap("tl.trans(key)", "tl.trans(nothing)"),))
    rows, (failure,) = mutants.write([broken], ARCH, tmp_path, 1)
    assert not rows and failure.startswith("broken: ") and "nothing" in failure


# --- wrong numbers ---

SHAPE = specs.Shape(32, 16, 4, 1)
EXACT = Problem(alignment="exact")
WINDOW = replace(EXACT, seq_q=60, seq_k=60, band=(-20, 0))
SHOWN_BY = {
    "portable_value_stride_of_key": replace(EXACT, head_dim_qk=24, alignment="aligned"),
    "portable_causal_one_key_more": causal(EXACT),
    "portable_window_one_key_less": WINDOW,
    "portable_negative_scale_as_positive": replace(EXACT, scale=-0.2),
    "portable_maximum_of_last_tile": replace(EXACT, scale=60.0),
    "portable_heads_interleaved": replace(EXACT, num_heads_q=6, num_heads_kv=2),
    "portable_blind_tile_nan": WINDOW,
    "portable_output_so_far_in_float16": replace(EXACT, seq_q=3, seq_k=600),
    "portable_head_dim_padding_stored": replace(EXACT, head_dim_v=24, alignment="aligned"),
    "portable_mask_ignored": Problem(mask="bool", alignment="aligned"),
    "portable_mask_inverted": Problem(mask="bool", alignment="aligned"),
    "portable_mask_scaled": Problem(mask="f32", alignment="aligned"),
    "portable_mask_of_first_head": Problem(mask="f32", alignment="aligned"),
}
# For offsets that no small tensor has.
FEWER_BITS = {"0x7FFFFFFF": "0x7FF", "0x3FFFFFFF": "0x7F"}


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Callable[..., tuple[Array, Array]]]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


@pytest.mark.parametrize("mutant", PORTABLE_MUTANTS, ids=lambda mutant: mutant.name)
def test_portable_mutants_are_wrong(
    interpreted: Callable[..., tuple[Array, Array]], mutant: Mutant, tmp_path: Path
) -> None:
    problem = SHOWN_BY.get(mutant.name, EXACT)
    tensors = inputs(problem)
    if mutant.name == "portable_nan_score_hidden":
        tensors["k"][0, 0, 7, 5] = np.nan
    text = edited(source(mutant), mutant.edits)
    for bits, fewer in FEWER_BITS.items():
        text = text.replace(bits, fewer)
    wrong = tmp_path / f"{mutant.name}.py"
    wrong.write_text(text)
    band = problem.band is not None or problem.mask != "none"
    spec = specs.forward(ARCH, "f16", 32, band, problem.mask, problem.alignment, SHAPE)
    check(problem, tensors, *interpreted(interpreter.run, spec, problem, tensors))
    with pytest.raises(AssertionError):
        check(problem, tensors, *interpreted(interpreter.run, spec, problem, tensors, wrong))


@pytest.mark.parametrize("mutant", HOPPER_MUTANTS, ids=lambda mutant: mutant.name)
def test_hopper_mutants_are_wrong_and_end(mutant: Mutant) -> None:
    # The emulator needs no pause to see a race.
    text = edited(source(mutant), mutant.edits).replace(mutants.PAUSE, "pass")
    complaint = noticed(text)
    assert complaint and not complaint.startswith("Deadlock")


def combined(parts: Array, sums: Array) -> tuple[Array, Array]:
    """Output and natural log-sum-exp, in float64."""
    with np.errstate(divide="ignore"):
        peak = np.maximum(sums.max(1), -1e300)
        weights = np.exp2(sums - peak[:, None])
        total = weights.sum(1)
        out = (weights[..., None] * parts).sum(1) / np.where(total == 0, 1, total)[..., None]
        return out, (peak + np.log2(total)) * np.log(2)


def check_combine(interpreted: Callable[..., tuple[Array, Array]], wrong: Path | None) -> None:
    heads, splits, seq, head_dim = 4, 3, 150, 64
    rng = np.random.default_rng(0)
    parts = rng.standard_normal((heads, splits, seq, head_dim)).astype(np.float32)
    sums = (3 * rng.standard_normal((heads, splits, seq))).astype(np.float32)
    sums[1] *= 1000
    sums[:, 0, 1::7] = -np.inf
    sums[2, :, 5] = -np.inf
    parts[np.isneginf(sums)] = 0
    spec = next(spec for spec in specs.specs(ARCH) if spec.name == "attention_forward.hopper.f16.d64.dense.split")
    out, lse = interpreted(interpreter.combine, spec, parts, sums, 2, wrong)
    exact, exact_lse = combined(parts.astype(np.float64), sums.astype(np.float64))
    np.testing.assert_allclose(out.reshape(exact.shape), exact, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(lse.reshape(exact_lse.shape), exact_lse, rtol=1e-5, atol=1e-5)


def test_combine_is_right(interpreted: Callable[..., tuple[Array, Array]]) -> None:
    check_combine(interpreted, None)


@pytest.mark.parametrize("mutant", COMBINE_MUTANTS, ids=lambda mutant: mutant.name)
def test_combine_mutants_are_wrong(
    interpreted: Callable[..., tuple[Array, Array]], mutant: Mutant, tmp_path: Path
) -> None:
    wrong = tmp_path / f"{mutant.name}.py"
    wrong.write_text(edited(source(mutant), mutant.edits))
    with pytest.raises(AssertionError):
        check_combine(interpreted, wrong)
