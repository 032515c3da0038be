"""A further part of the HTML report: a title and what stands under it."""

from __future__ import annotations

import base64
import html
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


@dataclass(frozen=True)
class Section:
    """One titled part of a report.

    Attributes:
        title, text: plain text, escaped on the page; ``text`` is the explanation under the title.
        content: a plotly figure, or HTML that is put in as it is (escape what people wrote with `html.escape`;
            pictures come from `picture`). The page's policy lets it load nothing, from disk or network.
        first: stand before the studies, not after them.
    """

    title: str
    content: Figure | str
    text: str = ""
    first: bool = False


def picture(png: bytes, alt: str, *, caption: str = "") -> str:
    """A PNG as HTML that carries its own bytes. ``alt`` says in words what it shows; both texts are escaped."""
    data = base64.b64encode(png).decode("ascii")
    image = f'<img src="data:image/png;base64,{data}" alt="{html.escape(alt)}">'
    return f"<figure>{image}<figcaption>{html.escape(caption)}</figcaption></figure>" if caption else image
