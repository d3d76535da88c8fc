"""How `python -m pdoc equinox_mtp` shows the package; in any other program this does nothing.

Annotations are short, `Float[Array, 'batch seq']`, by a switch that jaxtyping reads when it is
first imported: so this module comes first. And the modules' `__call__` is shown, which pdoc hides
with all names that begin with an underscore.
"""

import sys
import typing
from pathlib import Path

_TEMPLATE = """
{% extends "default/module.html.jinja2" %}
{% macro is_public(doc) %}
    {% if doc.name == "__call__" and doc.docstring %}true{% endif %}
    {{ default_is_public(doc) }}
{% endmacro %}
"""


def is_run_by_pdoc(program: str) -> bool:
    """Whether a program, as `sys.argv[0]`, is pdoc: `bin/pdoc`, or `pdoc/__main__.py`."""
    path = Path(program)
    return path.stem == "pdoc" or path.parts[-2:] == ("pdoc", "__main__.py")


def _set_up() -> None:
    from jinja2 import ChoiceLoader, DictLoader
    from pdoc.render import env

    setattr(typing, "GENERATING_DOCUMENTATION", "equinox_mtp")  # noqa: B010
    others = [] if env.loader is None else [env.loader]
    env.loader = ChoiceLoader([DictLoader({"module.html.jinja2": _TEMPLATE}), *others])


if is_run_by_pdoc("".join(sys.argv[:1])):
    _set_up()
