"""Results rendered: one document as JSON for programs and as HTML for people.

    document    the schema, and reading it
    write       report.json and report.html
    assemble    a document from a manifest and a validation
    html        the document as one self-contained page
    allocation  the quantized matrices by part and by decoder block
    coverage    how calibration text spread over routed experts
    charts      inline SVG from numbers
    svg         its elements, escaped
    text        numbers and foreign text as a reader can trust them

Nothing here measures or decides; what is not in the document is not on the page.
"""
