"""Figures with sliders: the picture moves with them, and is there without them."""

import base64
import subprocess
import sys
import types

import matplotlib.pyplot as plt
import pytest

from eqgen import interactive
from eqgen.interactive import explore


WIDGET = "application/vnd.jupyter.widget-view+json"


def draw(height=1, *, shift=0.5):
    fig, ax = plt.subplots(figsize=(2, 2))
    ax.plot([0, 1], [shift, shift + height])
    ax.set_ylim(0, 5)
    return fig


@pytest.fixture(autouse=True)
def no_open_figures():
    plt.close("all")


@pytest.fixture
def shown(monkeypatch):
    """What is displayed, as if a kernel ran this."""
    display = pytest.importorskip("IPython.display", reason="pip install -e '.[notebooks]'")
    outputs = []
    monkeypatch.setattr(interactive, "_in_notebook", lambda: True)
    monkeypatch.setattr(display, "display", lambda output, raw: outputs.append(output))
    return outputs


def picture(values):
    return interactive._png(draw(**values))


def test_sliders_redraw(shown):
    widgets = pytest.importorskip("ipywidgets", reason="pip install -e '.[notebooks]'")
    explore(draw, height=(1, 2, 4), shift=(0.0, 0.5))
    (output,) = shown
    assert base64.b64decode(output["image/png"]) == picture({})
    assert output["text/plain"] == "<figure at height = 1, shift = 0.5>"

    model = "IPY_MODEL_" + output[WIDGET]["model_id"]
    height, shift, image = widgets.widget_serialization["from_json"](model, None).children
    assert height.description == "height" and height.value == 1 and image.value == picture({})
    height.value = 4
    assert image.value == picture({"height": 4}) != picture({})
    shift.index = 0
    assert image.value == picture({"height": 4, "shift": 0.0})
    assert not plt.get_fignums()  # or the cell would show them once more


def test_picture_alone_without_ipywidgets(shown, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    explore(draw, height=(1, 2))
    (output,) = shown
    assert output.keys() == {"image/png", "text/plain"}
    assert base64.b64decode(output["image/png"]) == picture({})


def test_script_draws_once(monkeypatch):
    calls = []
    monkeypatch.setattr(plt, "show", lambda: calls.append("shown"))
    explore(lambda t=2: calls.append(t), t=(1, 2, 3))
    assert calls == [2, "shown"]


def test_notebook_is_a_shell_with_a_kernel(monkeypatch):
    for shell, answer in ((None, False), (object(), False), (types.SimpleNamespace(kernel=1), True)):
        monkeypatch.setitem(
            sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda shell=shell: shell)
        )
        assert interactive._in_notebook() is answer
    code = "import sys, eqgen.interactive as i; assert not i._in_notebook() and 'IPython' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("choices", "error", "message"),
    [
        ({}, TypeError, "name at least one argument"),
        ({"width": (1, 2)}, TypeError, "no argument 'width' with a default"),
        ({"height": (2, 3)}, ValueError, r"height = 1 is none of the choices \(2, 3\)"),
    ],
)
def test_choices_must_fit(choices, error, message):
    with pytest.raises(error, match=message):
        explore(draw, **choices)
