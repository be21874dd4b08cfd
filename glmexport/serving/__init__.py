"""A bundle behind the HTTP API that clients of OpenAI's speak.

    limits      how much one request may ask for
    names       names of tools
    sampling    tokens from logits
    text        text as it becomes certain
    grammar     reasoning and tool calls in it
    batch       the next tokens of several sequences in one step
    model       the bundle in memory
    schemas     how large a schema may be
    guides      answers held to one, by processes of guide_program
    answer      one request on its way through the model
    kept        sequences that later requests go on with
    metrics     what is counted
    engine      the thread that owns the model
    failure     errors as clients read them
    log         what is logged
    fields      what of a request is read, ignored or refused
    messages    conversations as templates read them
    orders      what a request asks of the model
    reply       answers as clients read them
    body        bodies, as they arrive
    stream      server-sent events
    app         paths
    guard       who may ask
    connection  HTTP on one connection, and its times
    listen      the socket, and how it is left
    server      all of it

Importing the package is quick; ``server`` needs the extra ``serve``.
"""
