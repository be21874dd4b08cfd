"""The conditions of a validation: how much is measured, what the bundle has to keep, and in how many threads."""

from __future__ import annotations

from dataclasses import dataclass, field

from glmexport.foundation.progress import Progress
from glmexport.foundation.target import Gates
from glmexport.results.arithmetic import UNCHECKED, OriginalArithmetic


@dataclass(frozen=True)
class BehaviourPlan:
    """The number of questions of each kind."""

    #: Number of texts a language to go on with.
    each: int = 8
    #: Number of sentences from English into every other language.
    translations: int = 3
    #: The most questions of all kinds a language; None: as many as there are.
    most: int | None = None
    #: Number of tokens at which an answer is cut.
    max_tokens: int = 64
    #: Number of prompts that are answered at a time, where the bundle's loop computes answers together; 0: one by one.
    batch: int = 8
    #: Number of prompts of which one is asked alone too where they are answered together; so are all that ask for a
    #: tool call.
    alone_every: int = 16


@dataclass(frozen=True)
class ValidationPlan:
    """The amount of text and time that a validation measures."""

    positions_per_language: int = 2048
    longest_text: int = 512
    #: Whether all text is judged at once; otherwise that of a language ends once its gates are decided.
    full_text: bool = False
    #: Texts a language for the shares of the divergence, each of which costs another pass of the original.
    share_texts: int = 1
    prompt_tokens: int = 128
    generated_tokens: int = 64
    #: Rounds of speed go on for so long; 0: two, which give no bounds.
    speed_seconds: float = 25
    #: Most bytes for computing the original whole, beside the rest of this process; None: most of the free memory.
    max_memory_bytes: int | None = None
    #: The questions that the models answer; None asks for no answers.
    behaviour: BehaviourPlan | None = field(default_factory=BehaviourPlan)


@dataclass(frozen=True)
class Conditions:
    """The conditions under which a bundle is validated on this machine."""

    plan: ValidationPlan
    #: The limits that the bundle has to keep.
    policy: Gates
    #: Number of threads of the original, and of everything else but the bundle.
    threads: int
    bundle_threads: int
    progress: Progress
    #: The way in which the original's products are computed; whoever starts a validation sets torch to it.
    arithmetic: OriginalArithmetic = UNCHECKED
