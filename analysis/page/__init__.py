"""Pages that open from disk: one file, nothing fetched, readable on a phone, in the dark and without JavaScript.

`film` turns the clips of both sides into stills that play in step, `render` fills the templates, `charts` draws with
Plotly, `results` gathers what the results page shows. `python -m analysis.page` makes that page.
"""
