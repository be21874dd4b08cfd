"""Results rendered: one document as JSON for programs and as HTML for people.

    document    the schema, and reading it
    write       report.json and its renderings
    assemble    a document from a manifest and a validation
    html        the document as one self-contained page
    markdown    the document for pull requests and wikis; gfm what is foreign to it
    junit       the gates for CI servers
    devices     several devices side by side
    compare     two documents: what changed by more than chance
    comparison  what it says; differing what else is not the same
    allocation  the quantized matrices by part and by decoder block
    coverage    how calibration text spread over routed experts
    speed       its rows, with bounds, and why a figure is not there
    charts      inline SVG from numbers
    svg         its elements, escaped
    text        numbers and foreign text as a reader can trust them

Nothing here measures; what is not in the document is not on the page.
"""
