"""The review page: cases, worst first, beside an interactive viewer; a folder that opens from disk without network.

`write_review` writes any such page; `write_adaptation` the one of a model that was adapted to a few scans, and
`write_comparison` the one of a benchmark, which has tables and curves in place of scans.

    report/index.html   the page; review.css and review.js beside it
    report/data.js      names, scores, tables, settings
    report/niivue.js    the viewer: NiiVue, out of the package ipyniivue
    report/volumes/     one file for each case and role, read when the case is opened
    report/pictures/

A page on disk may not fetch its neighbours but may load them as scripts, so everything is a script: volumes are NIfTI
in base64. They are written anew with a bare header, on the axes nearest to RAS: nothing else of a header leaves with
the page.
"""

from medmeta.review.adaptation import write_adaptation
from medmeta.review.cases import VOXEL_LIMIT, ReviewCase, evaluated_cases, predicted_cases
from medmeta.review.comparison import write_comparison
from medmeta.review.page import Cell, PageTable, write_review

__all__ = [
    "VOXEL_LIMIT",
    "Cell",
    "PageTable",
    "ReviewCase",
    "evaluated_cases",
    "predicted_cases",
    "write_adaptation",
    "write_comparison",
    "write_review",
]
