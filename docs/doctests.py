"""Examples in docstrings shown as code in the reference; a griffe extension."""

import re
import textwrap

import griffe

DOCTEST = re.compile(r"(?:^>>> .*\n?)(?:^.+\n?)*", re.M)
# an indented last paragraph is code too: where a name is not yet there to run an example
INDENTED = re.compile(r"(?<=\n\n)(?: {4}.*\n?)(?:^(?: {4}.*)?\n?)*\Z", re.M)


class Doctests(griffe.Extension):
    """Puts a fence around each example."""

    def on_object(self, *, obj, **kwargs):  # noqa: ARG002
        if obj.docstring:
            text = DOCTEST.sub(r"```pycon\n\g<0>\n```\n", obj.docstring.value)
            obj.docstring.value = INDENTED.sub(
                lambda code: f"```python\n{textwrap.dedent(code[0])}\n```\n", text
            )
