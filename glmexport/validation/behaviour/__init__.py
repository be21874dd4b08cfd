"""What judges generated text: pure functions, which know nothing of how it was generated.

toolcalls   GLM's grammar of tool calls
loops       a text that repeats itself to its end
drift       a text in another language than it should be in
tasks       tasks of the user's, and scores of answers to them
paired      the scores of the original and of the bundle on the same tasks
"""

from glmexport.validation.behaviour.drift import Guess, drifted, language
from glmexport.validation.behaviour.loops import Loop, loop
from glmexport.validation.behaviour.paired import paired
from glmexport.validation.behaviour.tasks import Message, Task, read_tasks, score, score_choice
from glmexport.validation.behaviour.toolcalls import Argument, Call, Fault, Parsed, parse
from glmexport.validation.results.paired import Paired

__all__ = [
    "Argument",
    "Call",
    "Fault",
    "Guess",
    "Loop",
    "Message",
    "Paired",
    "Parsed",
    "Task",
    "drifted",
    "language",
    "loop",
    "paired",
    "parse",
    "read_tasks",
    "score",
    "score_choice",
]
