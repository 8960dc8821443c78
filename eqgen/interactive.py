"""A figure with sliders, in a notebook; where sliders cannot live, the figure alone.

`explore(draw, t=(0.1, 0.3, 1.0))` shows the figure that `draw` returns, under a slider for `t`. One output holds
both the widget and a plain picture at the defaults of `draw`, and whoever shows it takes what it can: a notebook
with a running kernel the sliders, everything else the picture. The committed notebooks keep the picture only.
Needs ipywidgets for the sliders (in the extra `notebooks`), and works without.
"""

import base64
import inspect
import io
import sys
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure


def explore(draw: Callable[..., Figure], **choices: Sequence[Any]) -> None:
    """Shows the figure that `draw` makes, with a slider for each of its arguments in `choices`.

    In a plain Python process, where there is no notebook, the figure is drawn once and shown by `plt.show`.

    **Arguments:**

    - `draw`: takes the arguments by keyword and returns a new figure. Their defaults are where the sliders
        begin, and what the plain picture shows.
    - `choices`: argument -> the values its slider has, in this order. The default has to be among them.
    """
    start = _defaults(draw, choices)
    if not _in_notebook():
        draw(**start)
        plt.show()
        return

    from IPython.display import display  # which a notebook has

    picture = _png(draw(**start))
    words = ", ".join(f"{name} = {_label(value)}" for name, value in start.items())
    output = {"image/png": base64.b64encode(picture).decode(), "text/plain": f"<figure at {words}>"}
    display(_controls(draw, choices, start, picture) | output, raw=True)


def _controls(draw, choices, start, picture):
    """The output's entry for the widget; none without ipywidgets."""
    try:
        import ipywidgets
    except ImportError:
        return {}
    # In its own size; a box would stretch it to its width.
    image = ipywidgets.Image(value=picture, format="png", layout={"align_self": "flex-start"})
    sliders = {
        name: ipywidgets.SelectionSlider(
            options=[(_label(value), value) for value in values],
            value=start[name],
            description=name,
            continuous_update=False,  # redraw where a slider is let go, not all along the way
        )
        for name, values in choices.items()
    }

    def redraw(_):
        image.value = _png(draw(**{name: slider.value for name, slider in sliders.items()}))

    for slider in sliders.values():
        slider.observe(redraw, names="value")
    return ipywidgets.VBox([*sliders.values(), image])._repr_mimebundle_() or {}


def _defaults(draw, choices):
    parameters, start = inspect.signature(draw).parameters, {}
    if not choices:
        raise TypeError(
            "No choices; name at least one argument of draw and its values: explore(draw, t=(0, 1))."
        )
    for name, values in choices.items():
        if name not in parameters or parameters[name].default is inspect.Parameter.empty:
            raise TypeError(f"draw has no argument {name!r} with a default; the slider begins at it.")
        start[name] = parameters[name].default
        if start[name] not in values:
            raise ValueError(f"The default {name} = {start[name]} is none of the choices {tuple(values)}.")
    return start


def _label(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _in_notebook():
    """Whether a Jupyter kernel runs this; asking does not load IPython."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return getattr(shell, "kernel", None) is not None


def _png(fig):
    """The figure as a notebook shows it; closed, so that the cell does not show it again."""
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=fig.dpi, bbox_inches="tight", metadata={"Software": None})
    plt.close(fig)
    return buffer.getvalue()
