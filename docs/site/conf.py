"""Sphinx's settings for the documentation site, which `make docs` builds.

Everything that a page needs lies in the site: no fonts, scripts or pictures come from other hosts.
"""

import re
from importlib import import_module
from inspect import unwrap
from pathlib import Path
from typing import Any

import slm
from slm.callable_packages import STEPS

project = "slm"
release = version = slm.__version__
author = "the slm authors"
copyright = author
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]

# Anchors of headings as on GitHub, down to the third level: the documents link to them.
myst_heading_anchors = 3
# Blocks without a language are commands and their output.
highlight_language = "text"
suppress_warnings = ["misc.highlighting_failure"]  # a shortened JSON example is not JSON
copybutton_prompt_text = r"\$ |>>> "
copybutton_prompt_is_regexp = True

default_role = "code"  # in docstrings, backticks mean code
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_use_type_comments = False
maximum_signature_line_length = 60
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"slm {release}"
html_static_path = [str(Path(__file__).parent / "static")]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}


def plain_types(*arguments: Any) -> tuple[str | None, str | None]:
    """Shows a number with limits as its type: the text has the limits. Called by autodoc for each signature.

    Args:
        arguments: Those of the event autodoc-process-signature; the last two are the signature and the type of the result.
    """
    signature, result = arguments[-2:]
    return re.sub(r"~?(?:typing\.)?Annotated\[([\w.]+), [^\[\]]*\]", r"\1", signature or "") or None, result


def setup(app: Any) -> None:
    """Documents the steps that are also packages (`slm.train`) as the functions that they call.

    Args:
        app: Sphinx's application.
    """
    steps = {name: unwrap(getattr(import_module(module), name)) for name, module in STEPS.items()}
    for name in slm.__all__:
        getattr(slm, name)  # importing a package later would set its name again
    for name, function in steps.items():
        setattr(slm, name, function)
    app.connect("autodoc-process-signature", plain_types)
