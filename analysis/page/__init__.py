"""The report: one HTML page with everything in it, which asks no network for anything and runs no script but its own.

``report``      the page: answers first, then every finding, the gallery, the provenance; ``write`` makes it, and
                ``assemble`` one with other sections
``figures``     a drawn figure, and its files to download
``tables``      a table of numbers: digits, alignment, the rest as CSV
``gallery``     pictures with their maps, told by filters
``provenance``  what the page was made of
``markup``      text and bytes that go safely into HTML
``page.html``, ``page.css``, ``page.js``  its frame, its look, and what happens on a click
"""

from analysis.page.report import Section, assemble, write

__all__ = ["Section", "assemble", "write"]
