"""A matplotlib figure for a dark page: greys change places, colours stay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["GROUND", "darken"]

GROUND = "#181715"
"""What white becomes: the page behind the figure."""

_PAPER, _INK = 0.09, 0.93
# Channels of a grey differ by less than this.
_NEUTRAL = 0.04


def darken(figure: Figure) -> Figure:
    """Turn the figure's paper dark and its ink light, in place.

    White becomes `GROUND`, black nearly white, and greys between them lie between; anything that has a hue stays as it
    is, because the colours of `palette` are chosen to be read on both grounds. Images are left alone.
    """
    from matplotlib.collections import Collection
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.text import Text

    for artist in {id(x): x for x in figure.findobj()}.values():
        if isinstance(artist, Text):
            artist.set_color(_turned(artist.get_color()))
        elif isinstance(artist, Line2D):
            # All are read before one is written: a marker may take its colour from the line's.
            line, face, edge = artist.get_color(), artist.get_markerfacecolor(), artist.get_markeredgecolor()
            artist.set_color(_turned(line))
            artist.set_markerfacecolor(_turned(face))
            artist.set_markeredgecolor(_turned(edge))
        elif isinstance(artist, Patch):
            face, edge = artist.get_facecolor(), artist.get_edgecolor()
            artist.set_facecolor(_turned(face))
            artist.set_edgecolor(_turned(edge))
        elif isinstance(artist, Collection) and artist.get_array() is None:
            faces, edges = artist.get_facecolor(), artist.get_edgecolor()
            artist.set_facecolor([_turned(x) for x in faces])
            artist.set_edgecolor([_turned(x) for x in edges])
    return figure


def _turned(colour: Any) -> Any:
    """The same colour, or the grey that stands in for this one on a dark page; transparency stays."""
    from matplotlib.colors import to_rgb, to_rgba

    if isinstance(colour, str) and colour in ("none", "auto"):
        return colour
    red, green, blue, alpha = to_rgba(colour)
    if max(red, green, blue) - min(red, green, blue) > _NEUTRAL:
        return colour
    grey = (red + green + blue) / 3
    if grey > 0.995:
        return (*to_rgb(GROUND), alpha)
    level = _PAPER + (1 - grey) * (_INK - _PAPER)
    return level, level, level, alpha
