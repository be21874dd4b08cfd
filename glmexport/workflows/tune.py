"""A target's settings, chosen by measurement on this machine: the legal ones, the fastest one, and the evidence."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from glmexport import __version__
from glmexport.calibration.corpus import evaluation_documents
from glmexport.engine.session import require_provider
from glmexport.foundation import machine
from glmexport.foundation.disk import require_free
from glmexport.foundation.errors import InputError
from glmexport.foundation.evidence import FLOATS, CandidateSettings, Divergences, Evidence
from glmexport.foundation.progress import Progress
from glmexport.foundation.recipe import Recipe
from glmexport.foundation.session_settings import check_provider, check_session_entries
from glmexport.foundation.target import Target
from glmexport.quantization.store import WorkDirectory
from glmexport.quantization.weights import Weights
from glmexport.reference.arithmetic import computing
from glmexport.reference.reference import Reference
from glmexport.tuning.arithmetic import Variants
from glmexport.tuning.assemble import TunedModel, evidence_of, tuned_target
from glmexport.tuning.candidates import Numerics, identity
from glmexport.tuning.measure import Side
from glmexport.tuning.options import TuneOptions
from glmexport.tuning.plan import MeasuredCandidates, TuningPlan
from glmexport.tuning.rounding import RoundedWeights
from glmexport.tuning.search import Search
from glmexport.tuning.slices import SliceBundles
from glmexport.tuning.streams import ArithmeticStreams, summarized
from glmexport.tuning.write import write_target
from glmexport.validation.fidelity import Streamed
from glmexport.validation.reference import reference_states
from glmexport.validation.texts import text_digest
from glmexport.workflows.build import quantize
from glmexport.workflows.calibration_text import cache_text, calibration_documents, packed
from glmexport.workflows.estimate import estimate
from glmexport.workflows.original import Original
from glmexport.workflows.provenance import source_of
from glmexport.workflows.tuned_recipes import recipes_to_try
from glmexport.workflows.validate import BuildOptions

#: Tokens of text for the scales of quantized caches, fewer than a build takes: every candidate passes over it.
_CACHE_TOKENS, _CACHE_SEQUENCE = 2048, 256


@dataclass(frozen=True)
class Tuned:
    """The tuned target and its file; ``chosen`` is None where the start stays."""

    path: Path
    target: Target
    evidence: Evidence
    chosen: CandidateSettings | None


def tune(original: Original, target: Target, output: Path, options: TuneOptions, progress: Progress) -> Tuned:
    """Measure every legal candidate beside the present ``target``, and write the best as a target to ``output``.

    Finished measurements are kept until the tuning is done; the same call goes on after the last one.

    Raises:
        InputError: ``output`` exists and may not be replaced, no candidate keeps the allowance, or the target's graphs
            have fixed shapes.
        MachineError: the disk has too little space, the start does not run here, or another process tunes the same.
    """
    _refuse_output(output, options.force)
    _refuse_settings(target, options)
    if target.graph.static_shapes:
        raise InputError(
            f"The target {target.name} runs graphs of fixed shapes only, and tuning measures graphs of any.",
            next_step="Set its graph.chunk and graph.capacity by hand, and compare bundles by glmexport compare.",
        )
    require_provider(target.provider.name, target.provider.package)
    torch.set_num_threads(options.cores)
    plan = _plan(original, target, options, progress)
    _require_space(original, plan, output.parent)
    work = _work_directory(original, plan, output.parent, progress)
    with work.locked(), computing(options.arithmetic):
        measured = _measured(original, plan, work, progress)
        for kind, reason in measured.illegal.items():
            progress.remark(f"{kind.label} is left out: {reason}.")
        legal = [each for each in plan.candidates if measured.is_legal(each)]
        if not legal:
            raise InputError(
                f"No candidate for {original.checkpoint.name} keeps the allowance.",
                next_step="Give a larger --allowance, or start from a target with a more accurate default_recipe.",
            )
        search = _search(original, plan, measured, work, progress)
        others = [each for each in legal if each != plan.start]
        chosen, confirmed = search.choose(others, start_is_legal=plan.start in legal)
        model = TunedModel(original.checkpoint.name, original.checkpoint.digest(progress))
        evidence = evidence_of(plan, model, measured, search.fates, chosen, confirmed)
        settings = chosen.settings if chosen else None
        tuned = tuned_target(target, settings, evidence, output.stem)
        original.checkpoint.refuse_changes()
        _refuse_output(output, options.force)
        write_target(tuned, output)
    shutil.rmtree(work.path)
    return Tuned(output, tuned, evidence, settings)


def _refuse_output(output: Path, force: bool) -> None:
    if output.suffix != ".toml":
        raise InputError(f"{output} is no .toml file, and a target is.", next_step="Name it FILE.toml with -o.")
    if output.exists() and not (force and output.is_file()):
        raise InputError(f"{output} exists.", next_step="Choose another file with -o, or replace it with --force.")


def _refuse_settings(target: Target, options: TuneOptions) -> None:
    """Refuse values to try that no target may have."""
    try:
        for name, values in options.session.items():
            for value in values:
                check_session_entries({name: value})
        for name, values in options.provider.items():
            for value in values:
                check_provider(target.provider.name, {name: value})
    except ValueError as error:
        raise InputError(f"This cannot be tried: {error}.", next_step="Leave it out, or give another value.") from error


def _plan(original: Original, target: Target, options: TuneOptions, progress: Progress) -> TuningPlan:
    recipes = recipes_to_try(original, target, options.recipes, progress)
    documents = evaluation_documents((), original.tokenizer)
    return TuningPlan.make(original.architecture, original.tokenizer, target, recipes, documents, options)


def _require_space(original: Original, plan: TuningPlan, parent: Path) -> None:
    """Require disk space for everything that is there at once.

    That is slices in every recipe, fused and split; the streams of one recipe before and after a block; those of the
    original.

    Raises:
        MachineError: there is too little.
    """
    axes = plan.axes
    whole = [original.planned(recipe, plan.target) for recipe in plan.recipes.values()]
    bundles = sum(
        estimate(replace(planned, architecture=architecture), None).bundle_bytes
        for planned in whole
        for architecture in plan.slices.architectures
    )
    rows = sum(len(text.ids) for text in plan.texts) + _CACHE_TOKENS * (len(axes.kv_caches) > 1)
    streams = 2 * (len(axes.accuracy_levels) * len(axes.kv_caches) + 1) + 3
    states = streams * rows * original.architecture.hidden_size * 4
    # Weights are stored once for all caches.
    require_free(parent, bundles * len(axes.packed_qkv) + states, "Tuning")


def _work_directory(original: Original, plan: TuningPlan, parent: Path, progress: Progress) -> WorkDirectory:
    """Open the directory of this very tuning: everything that a measurement depends on is part of its name."""
    job = {
        "glmexport": __version__,
        "tuning of": plan.target.model_dump(mode="json", exclude={"evidence", "provenance"}),
        "checkpoint": original.checkpoint.digest(progress),
        "recipes": {name: recipe.digest() for name, recipe in plan.recipes.items()},
        "candidates": [identity(each) for each in plan.candidates],
        "texts": text_digest(plan.texts),
        "options": asdict(plan.options) | {"force": None, "arithmetic": plan.options.arithmetic.route},
        "machine": [machine.processor_name(), machine.cores(), machine.system_name(), machine.library_versions()],
    }
    return WorkDirectory.for_job(parent, job)


def _measured(original: Original, plan: TuningPlan, work: WorkDirectory, progress: Progress) -> MeasuredCandidates:
    """Measure the divergence of every recipe in every arithmetic, over the whole model."""
    reference = Reference(original.checkpoint, original.architecture)
    answers = Streamed(reference_states(reference, plan.texts, work.path, progress, kept=work), reference)
    variants = Variants.for_arithmetics(plan.target, plan.arithmetics)
    found: dict[Numerics, Divergences] = {}
    for index, (name, recipe) in enumerate(plan.recipes.items()):
        weights = _weights(original, recipe, plan.options, work, progress)
        streams = ArithmeticStreams(
            f"numerics-{index}",
            weights,
            # Scales may have been folded out of the embedding's neighbours.
            Reference(weights.checkpoint, original.architecture),
            variants,
            plan.texts,
            work,
            plan.options.cores,
            _cache_text(original, recipe, plan),
        )
        documents = streams.divergences(answers, progress)
        for each in plan.arithmetics:
            kind = Numerics(name, each.level, each.kv_cache)
            found[kind] = summarized(documents[each.name], plan.target.gates.confidence)
    return plan.judged(found)


def _weights(
    original: Original, recipe: Recipe, options: TuneOptions, work: WorkDirectory, progress: Progress
) -> Weights:
    """Return weights as a build would quantize them, or, which takes no time, rounded to nearest."""
    if options.calibrated and recipe.needs_calibration:
        as_built = BuildOptions(options.cores, arithmetic=options.arithmetic)
        return quantize(original, recipe, as_built, work.path, progress)
    return RoundedWeights(original.checkpoint, original.architecture, recipe, searched=True)


def _cache_text(original: Original, recipe: Recipe, plan: TuningPlan) -> list[list[int]]:
    """Return token ids of calibration text for the scales of quantized caches; none where there are none to try."""
    if recipe.calibration is None or plan.axes.kv_caches == (FLOATS,):
        return []
    sizes = {"tokens": _CACHE_TOKENS, "sequence_length": _CACHE_SEQUENCE}
    documents = calibration_documents(original, recipe, ())
    return cache_text(packed(original, documents, recipe.calibration.model_copy(update=sizes)))


def _search(
    original: Original, plan: TuningPlan, measured: MeasuredCandidates, work: WorkDirectory, progress: Progress
) -> Search:
    """Return a search for the fastest candidate, in slices that are built when they are asked for."""
    architecture = original.architecture
    bundles = SliceBundles(
        work.path / "slices",
        plan.slices,
        original.checkpoint,
        Reference(original.checkpoint, architecture).rotary_tables(architecture.context_length),
        plan.target,
        plan.recipes,
        source_of(original, progress),
    )
    return Search(
        start=plan.start,
        load=lambda settings: Side(bundles.for_settings(settings), settings.threads, plan.slices, plan.workload),
        divergences=measured.divergences,
        work=work,
        prefer=plan.options.prefer,
        confidence=plan.target.gates.confidence,
        seconds=plan.options.seconds,
        progress=progress,
    )
