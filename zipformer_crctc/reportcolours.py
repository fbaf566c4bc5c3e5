"""The colours of a report, each for a light and for a dark page. Charts name them; the page says what they are."""

from __future__ import annotations

_COLOURS = {
    "ink": ("#222222", "#e8e8e8"),
    "grey": ("#5a5a5a", "#a9a9a9"),
    "line": ("#e1e1e1", "#3b3d40"),
    "paper": ("#ffffff", "#16181b"),
    "link": ("#2b5d95", "#8ab8ee"),
    "first": ("#2f6aab", "#6fa6e2"),
    "second": ("#b8610f", "#e39b4b"),
    "voice": ("#2f6aab", "#6fa6e2"),
    "place": ("#b04a33", "#db8b74"),
    "tongue": ("#3f7d3a", "#86bd80"),
    "manner": ("#7650a2", "#b598d9"),
    "tone": ("#85681a", "#cdb060"),
    "correct": ("#787878", "#8d8d8d"),
    "wrong": ("#a51e14", "#ff7a6b"),
    "substituted": ("#ffe3a8", "#66500f"),
    "deleted": ("#f9c5bf", "#7a302a"),
    "inserted": ("#c9def5", "#27507c"),
}


def colour(name: str) -> str:
    """A colour by its name, as CSS; a figure that is taken out of the page keeps the light one."""
    return f"var(--{name}, {_COLOURS[name][0]})"


def definitions(dark_class: str | None = None) -> str:
    """The style rules that define the colours: light ones, also on paper, and dark ones for screens that are set so.

    dark_class: on a page that decides itself whether it is dark, the class by which it tells.
    """
    light, dark = ("; ".join(f"--{name}: {pair[side]}" for name, pair in _COLOURS.items()) for side in (0, 1))
    if dark_class is not None:
        return f":root {{ {light} }}\n.{dark_class} {{ {dark} }}"
    return f":root {{ {light} }}\n@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}"


SYSTEM_COLOURS = (colour("first"), colour("second"))
"""Of the first and the second system, in all charts."""
