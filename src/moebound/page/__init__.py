"""One HTML file that needs nothing else: what the demo's and the study's pages have in common.

No script, no font, no picture to fetch; light or dark as the reader's system is; readable on a
phone and on paper.
"""

from moebound.page.document import document, style
from moebound.page.svg import DASHES, FAINT, INK, MARKERS, SERIES, SOFT, drawing, inline

__all__ = [
    "DASHES",
    "FAINT",
    "INK",
    "MARKERS",
    "SERIES",
    "SOFT",
    "document",
    "drawing",
    "inline",
    "style",
]
