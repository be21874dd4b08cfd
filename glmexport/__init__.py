"""The way from a full-precision GLM checkpoint to a validated ONNX bundle, and to the machines that run it.

The folders are rooms, in an order: each imports only those above it. The run wing stands on a server or a device
and needs no training framework. The build wing is below it, as a bundle is measured by the very engine that serves it.

Under both wings:

    foundation      errors, definitions, files, progress, and what is known of this machine

The run wing:

    tokenizer       text to token ids and back, and chat templates
    chat            GLM's grammar of reasoning and tool calls, and the schemas of a tool's arguments
    bundle          the directory that is deployed: its manifest, its names, and what its loop has to know
    results         what validation measured, and the statistics by which two figures are compared
    engine          sessions, caches, sequences, sampling and speculation: what runs a bundle
    report          results rendered; computes nothing
    release         a bundle signed, attested, verified, packed and carried
    wire            the way to other machines, and the programs that are sent there
    deployment      signed bundles on servers: sent, verified there, switched to, taken back
    serving         a server that speaks OpenAI's API

The build wing, in the order in which a build passes through it:

    demo            a small trained checkpoint
    checkpoint      files on disk, read lazily and checked before they are mapped
    architecture    what the files describe: one declaration a family, no numbers
    reference       the original's arithmetic: transformers' own layers, filled block by block
    calibration     text, packed sequences, and the Hessian of every tap
    formats         how a matrix is stored, and the plan that says which matrix has which format
    quantization    pure functions on arrays, and the walk that applies them one decoder block at a time
    graph           the decoder as an ONNX graph of our own operators, built from the declaration
    lowering        one pass a file: our operators become what the target can run
    assembly        graphs, weights and manifest become a bundle; the weights of one are read back
    validation      the bundle's answers against the original's
    devices         the same on other machines
    tuning          which of a target's legal settings are fastest on a machine, and what they cost in divergence

What people call:

    workflows       each verb's stages in order, one file a verb
    cli             one file a verb; the only place that prints and catches errors
    lm_eval         bundles and checkpoints as a model of EleutherAI's harness
"""

__version__ = "0.1.0"
