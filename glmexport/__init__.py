"""From a full-precision GLM checkpoint to a validated ONNX bundle.

The folders are the stages, in the order in which a build passes through them. A stage imports only stages
above it, and the shared vocabulary in errors, definition, recipe, target, evidence, resources and progress.

    checkpoint      files on disk, read lazily and checked before they are mapped
    architecture    what the files describe: one declaration a family, no numbers
    calibration     text, packed sequences, and the Hessian of every tap
    quantization    pure functions on arrays, and the walk that applies them one decoder block at a time
    graph           the decoder as an ONNX graph of our own operators, built from the declaration
    lowering        one pass a file: our operators become what the target can run
    bundle          the directory that is deployed, and its manifest
    chat            what an argument of a tool call is, by the tool's schema
    validation      the bundle's answers against the original's
    tuning          which of a target's legal settings are fastest on a machine, and what they cost in divergence
    report          results rendered; computes nothing
    release         a bundle signed, attested, verified, packed and carried
    deployment      signed bundles on servers: sent, verified there, switched to, taken back
    serving         a server that speaks OpenAI's API, and GLM's grammar of reasoning and tool calls
    cli             one file a verb; the only place that prints and catches errors

``compile`` runs the stages of a build; ``tune`` those of a tuning.
"""

__version__ = "0.1.0"
