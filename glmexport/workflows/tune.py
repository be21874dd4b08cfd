"""A target's settings chosen by measurement on this machine: what may be taken, what is fastest, and the evidence."""

from __future__ import annotations

import datetime
import itertools
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from glmexport import __version__
from glmexport.calibration.corpus import evaluation_documents
from glmexport.calibration.sequences import pack
from glmexport.engine.session import require_provider
from glmexport.foundation import machine
from glmexport.foundation.definition import names
from glmexport.foundation.disk import require_free
from glmexport.foundation.errors import InputError
from glmexport.foundation.evidence import FLOATS, CandidateSettings, Divergences, Evidence, Gains, KvCache, Preference
from glmexport.foundation.progress import Progress
from glmexport.foundation.recipe import RECIPES, STORED, Recipe, open_recipe
from glmexport.foundation.session_settings import check_provider, check_session_entries
from glmexport.foundation.target import Target
from glmexport.quantization.store import WorkDirectory
from glmexport.quantization.weights import Weights
from glmexport.reference.reference import Reference
from glmexport.tuning.assemble import Measured, tried, tuned_target, verdict_of
from glmexport.tuning.candidates import EXACT_LEVEL, Numerics, axes_of, candidates, identity, numerics, start_settings
from glmexport.tuning.measure import Side, Workload
from glmexport.tuning.pareto import Timed, too_divergent
from glmexport.tuning.rounding import RoundedWeights
from glmexport.tuning.search import Search
from glmexport.tuning.slices import SliceBundles, slices_of
from glmexport.tuning.streams import Streams, summarized
from glmexport.tuning.write import write_target
from glmexport.validation.fidelity import Streamed
from glmexport.validation.reference import reference_states
from glmexport.validation.run import ValidationPlan, texts_for
from glmexport.validation.texts import text_digest
from glmexport.workflows.build import quantize
from glmexport.workflows.calibration_text import cache_text, calibration_context, calibration_documents
from glmexport.workflows.estimate import estimate
from glmexport.workflows.job import Job, Original, recipe_for, refuse_formats
from glmexport.workflows.provenance import source_of
from glmexport.workflows.validate import BuildOptions

#: Calibration text for the scales of quantized caches, less than a build takes: every candidate passes over it.
_CACHE_TOKENS, _CACHE_SEQUENCE = 2048, 256
#: Tokens of the short prompt.
_SHORT = 32


@dataclass(frozen=True)
class TuneOptions:
    """What a tuning is free to choose."""

    #: Of the machine: for everything but the candidates, and the most that those take.
    cores: int
    prefer: Preference = "balanced"
    #: Share of the target's gate on the mean divergence that a candidate may use up.
    allowance: float = 0.25
    #: To try in place of the shipped recipes of the start's bits.
    recipes: tuple[str, ...] = ()
    #: To try in place of floats and 8 bits.
    kv_caches: tuple[KvCache, ...] = ()
    threads: tuple[int, ...] = ()
    session: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    provider: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    #: Of the rounds of a finalist.
    seconds: float = 25
    #: Tokens a language for the divergence.
    positions: int = 128
    #: Of the long prompt, and behind either.
    prompt_tokens: int = 512
    generated_tokens: int = 16
    #: Measure the divergence of weights that GPTQ made, a whole build's work for each recipe.
    calibrated: bool = False
    force: bool = False


@dataclass(frozen=True)
class Tuned:
    """The tuned target and its file; ``chosen`` is None where the start stays."""

    path: Path
    target: Target
    evidence: Evidence
    chosen: CandidateSettings | None


def tune(original: Original, target: Target, output: Path, options: TuneOptions, progress: Progress) -> Tuned:
    """Measure every legal candidate beside what ``target`` says now, and write the best as a target to ``output``.

    Finished measurements are kept until the tuning is done; the same call goes on after the last one.

    Raises:
        InputError: ``output`` exists and may not be replaced, no candidate keeps the allowance, or the target's graphs
            have fixed shapes.
        MachineError: the disk has too little space, the start does not run here, or somebody else tunes the same.
    """
    _refuse(output, options.force)
    _refuse_settings(target, options)
    if target.graph.static_shapes:
        raise InputError(
            f"The target {target.name} runs graphs of fixed shapes only, and tuning measures graphs of any.",
            next_step="Set its graph.chunk and graph.capacity by hand, and compare bundles by glmexport compare.",
        )
    require_provider(target.provider.name, target.provider.package)
    torch.set_num_threads(options.cores)
    tuning = _Tuning(original, target, options, progress)
    tuning.require_space(output.parent)
    work = tuning.work_directory(output.parent)
    with work.locked():
        measured = tuning.measured(work)
        for kind, reason in measured.illegal.items():
            progress.remark(f"{_told(kind)} is left out: {reason}.")
        legal = [each for each in tuning.every if measured.is_legal(each)]
        if not legal:
            raise InputError(
                f"No candidate for {original.checkpoint.name} keeps the allowance.",
                next_step="Give a larger --allowance, or start from a target with a more accurate default_recipe.",
            )
        search = tuning.search(measured, work)
        others = [each for each in legal if each != tuning.start]
        chosen, confirmed = search.choose(others, start_is_legal=tuning.start in legal)
        evidence = tuning.evidence(measured, search, chosen, confirmed)
        settings = chosen.settings if chosen else None
        tuned = tuned_target(target, settings, evidence, output.stem)
        original.checkpoint.refuse_changes()
        _refuse(output, options.force)
        write_target(tuned, output)
    shutil.rmtree(work.path)
    return Tuned(output, tuned, evidence, settings)


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


class _Tuning:
    """What is compared, on what, and how."""

    def __init__(self, original: Original, target: Target, options: TuneOptions, progress: Progress) -> None:
        self.original = original
        self.target = target
        self.options = options
        self.progress = progress
        architecture = original.architecture
        self.recipes = _recipes(original, target, options.recipes, progress)
        self.start = start_settings(target, next(iter(self.recipes)), options.cores)
        self.axes = axes_of(
            target,
            architecture,
            self.recipes,
            self.start,
            options.cores,
            kv_caches=options.kv_caches,
            threads=options.threads,
            session=options.session,
            provider=options.provider,
        )
        self.every = candidates(self.start, self.axes)
        plan = ValidationPlan(positions_per_language=options.positions)
        documents = evaluation_documents((), original.tokenizer)
        self.texts = texts_for(documents, original.tokenizer, architecture, plan)
        self.slices = slices_of(architecture)
        # Fixed token ids, with room in the context for what is generated.
        length = max(1, min(options.prompt_tokens, architecture.context_length - options.generated_tokens))
        prompt = torch.cat([text.ids for text in self.texts])[:length].tolist()
        self.workload = Workload(tuple(prompt), min(_SHORT, max(1, len(prompt) // 2)), options.generated_tokens)

    def require_space(self, parent: Path) -> None:
        """Slices in every recipe, fused and split; the streams of one recipe before and behind a block; the original's.

        Raises:
            MachineError: there is too little.
        """
        bundles = sum(
            estimate(architecture, recipe, 1.0, None).bundle_bytes
            for recipe in self.recipes.values()
            for architecture in self.slices.architectures
        )
        rows = sum(len(text.ids) for text in self.texts) + _CACHE_TOKENS * (len(self.axes.kv_caches) > 1)
        streams = 2 * (len(self.axes.accuracy_levels) * len(self.axes.kv_caches) + 1) + 3
        states = streams * rows * self.original.architecture.hidden_size * 4
        # Weights are stored once for all caches.
        require_free(parent, bundles * len(self.axes.packed_qkv) + states, "Tuning")

    def work_directory(self, parent: Path) -> WorkDirectory:
        """The directory of this very tuning: everything that a measurement depends on is part of its name."""
        job = {
            "glmexport": __version__,
            "tuning of": self.target.model_dump(mode="json", exclude={"evidence", "provenance"}),
            "checkpoint": self.original.checkpoint.digest(self.progress),
            "recipes": {name: recipe.digest() for name, recipe in self.recipes.items()},
            "candidates": [identity(each) for each in self.every],
            "texts": text_digest(self.texts),
            "options": asdict(self.options) | {"force": None},
            "machine": [machine.processor_name(), machine.cores(), machine.system_name(), machine.library_versions()],
        }
        return WorkDirectory.for_job(parent, job)

    def measured(self, work: WorkDirectory) -> Measured:
        """The divergence of every recipe in every arithmetic, over the whole model."""
        original, options = self.original, self.options
        reference = Reference(original.checkpoint, original.architecture)
        states = reference_states(reference, self.texts, work.path, self.progress, kept=work)
        wanted = itertools.product(self.axes.accuracy_levels, self.axes.kv_caches)
        # Those with floats are what the scales of the others rest on.
        floats = [(level, FLOATS) for level in (EXACT_LEVEL, *self.axes.accuracy_levels)]
        kinds = {_key(*kind): kind for kind in (*floats, *wanted)}
        targets = {key: _arithmetic(self.target, *kind) for key, kind in kinds.items()}
        found: dict[Numerics, Divergences] = {}
        for index, (name, recipe) in enumerate(self.recipes.items()):
            weights = self._weights(recipe, work)
            streams = Streams(
                f"numerics-{index}",
                weights,
                # Scales may have been folded out of the embedding's neighbours.
                Reference(weights.checkpoint, original.architecture),
                targets,
                _key(EXACT_LEVEL, FLOATS),
                self.texts,
                work,
                options.cores,
                {key: _key(level, FLOATS) for key, (level, cached) in kinds.items() if cached != FLOATS},
                self.cache_text(recipe),
            )
            for key, documents in streams.divergences(Streamed(states, reference), self.progress).items():
                found[Numerics(name, *kinds[key])] = summarized(documents, self.target.gates.confidence)
        limit = self.target.gates.kl_mean_nats if options.calibrated else None
        base = found[numerics(self.start).exact]
        reasons = {
            kind: too_divergent(found[kind], base, self._allowance, calibrated_limit=limit)
            for kind in found
            if kind.accuracy_level in self.axes.accuracy_levels and kind.kv_cache in self.axes.kv_caches
        }
        return Measured(found, {kind: reason for kind, reason in reasons.items() if reason})

    def search(self, measured: Measured, work: WorkDirectory) -> Search:
        """Of the fastest, in slices that are built when they are asked for."""
        original, slices, workload = self.original, self.slices, self.workload
        architecture = original.architecture
        bundles = SliceBundles(
            work.path / "slices",
            slices,
            original.checkpoint,
            Reference(original.checkpoint, architecture).rotary_tables(architecture.context_length),
            self.target,
            self.recipes,
            source_of(original, self.progress),
        )
        return Search(
            start=self.start,
            load=lambda settings: Side(bundles.of(settings), settings.threads, slices, workload),
            divergences=measured.divergences,
            work=work,
            prefer=self.options.prefer,
            confidence=self.target.gates.confidence,
            seconds=self.options.seconds,
            progress=self.progress,
        )

    def evidence(self, measured: Measured, search: Search, chosen: Timed | None, confirmed: Gains | None) -> Evidence:
        """Everything that was found out, for the target's file."""
        checkpoint, options, start = self.original.checkpoint, self.options, self.start
        illegal_start = measured.illegal.get(numerics(start), "")
        return Evidence(
            verdict=verdict_of(chosen, confirmed, illegal_start, options.prefer),
            confirmed=confirmed,
            start=self.target.name,
            checkpoint=checkpoint.name,
            checkpoint_digest=checkpoint.digest(self.progress),
            prefer=options.prefer,
            allowance_nats=self._allowance,
            weights="gptq" if options.calibrated else "round-to-nearest",
            text_digest=text_digest(self.texts),
            timed=self.slices.description,
            prompt_tokens=(self.workload.short, len(self.workload.prompt)),
            generated_tokens=self.workload.generated,
            processor=machine.processor_name(),
            cores=options.cores,
            system=machine.system_name(),
            libraries=machine.library_versions(),
            date=datetime.datetime.now(datetime.UTC).date().isoformat(),
            candidates=tuple(tried(each, start, measured, search.fates) for each in self.every),
        )

    def cache_text(self, recipe: Recipe) -> list[list[int]]:
        """Token ids of calibration text for the scales of quantized caches; nothing where there are none to try."""
        if recipe.calibration is None or self.axes.kv_caches == (FLOATS,):
            return []
        sizes = {"tokens": _CACHE_TOKENS, "sequence_length": _CACHE_SEQUENCE}
        plan = recipe.calibration.model_copy(update=sizes)
        documents = calibration_documents(self.original, recipe, ())
        return cache_text(pack(documents, self.original.tokenizer, plan, calibration_context(self.original)))

    @property
    def _allowance(self) -> float:
        """Nats per token."""
        return self.options.allowance * self.target.gates.kl_mean_nats

    def _weights(self, recipe: Recipe, work: WorkDirectory) -> Weights:
        original, options = self.original, self.options
        if options.calibrated and recipe.needs_calibration:
            return quantize(original, recipe, BuildOptions(options.cores), work.path, self.progress)
        return RoundedWeights(original.checkpoint, original.architecture, recipe, searched=True)


def _key(level: int, cached: KvCache) -> str:
    """What a kind of arithmetic is called in the work directory."""
    return f"level-{level}" if cached == FLOATS else f"level-{level}-{cached}"


def _arithmetic(target: Target, level: int, cached: KvCache) -> Target:
    return target.model_copy(
        update={
            "weights": target.weights.model_copy(update={"accuracy_level": level}),
            "graph": target.graph.model_copy(update={"kv_cache": cached}),
        }
    )


def _told(kind: Numerics) -> str:
    cache = "" if kind.kv_cache == FLOATS else f" with a cache in {kind.kv_cache}"
    return f"{kind.recipe} at accuracy_level {kind.accuracy_level}{cache}"


def _refuse(output: Path, force: bool) -> None:
    if output.suffix != ".toml":
        raise InputError(f"{output} is no .toml file, and a target is.", next_step="Name it FILE.toml with -o.")
    if output.exists() and not (force and output.is_file()):
        raise InputError(f"{output} exists.", next_step="Choose another file with -o, or replace it with --force.")


def _recipes(original: Original, target: Target, given: Sequence[str], progress: Progress) -> dict[str, Recipe]:
    """Recipes to try, by what a target calls them by; the start's first.

    Raises:
        DefinitionError: there is none of that name.
        InputError: the target has no kernels for one that was named.
    """
    start = recipe_for(original, None, target)
    default = STORED if start.keeps_stored else _called(target.weights.default_recipe)
    recipes = {default: start}
    refuse_formats(original, Job(target, start, Path()))
    if start.budget:
        progress.remark(f"The recipe {start.name} chooses formats by a budget; {_formats(start)} is measured instead.")
    if start.keeps_stored:
        if given:
            recipe_for(original, given[0], target)
        return recipes
    for name in given:
        recipe = recipe_for(original, name, target)
        refuse_formats(original, Job(target, recipe, Path()))
        recipes.setdefault(_called(name), recipe)
    if given or start.linears is None or start.budget:
        return recipes
    for name in names(RECIPES):
        recipe = open_recipe(name)
        alike = recipe.solver.method == start.solver.method and recipe.budget is None
        if not alike or recipe.linears is None or recipe.linears.bits != start.linears.bits:
            continue
        try:
            refuse_formats(original, Job(target, recipe, Path()))
        except InputError:
            # Not a format of the target's, or not one for a model of this size.
            continue
        recipes.setdefault(name, recipe)
    return recipes


def _called(recipe: str) -> str:
    """A file is found again from wherever the tuned target is used."""
    return str(Path(recipe).absolute()) if recipe.endswith(".toml") else recipe


def _formats(recipe: Recipe) -> str:
    return recipe.linears.label if recipe.linears else "full precision"
