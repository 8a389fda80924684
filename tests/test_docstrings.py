"""Docstrings promise only exceptions that can be raised, by the function or by what it calls.

ruff's DOC502 knows the function's own `raise` alone; most of ours stand in the checks that it calls.
"""

import ast
import re
from collections import defaultdict
from functools import cache
from pathlib import Path

import debiased_laplace

PACKAGE = Path(debiased_laplace.__file__).parent
Definition = ast.FunctionDef | ast.ClassDef
# exceptions that no `raise` of the package shows: passed on, or by the operating system
RAISED_BY = {
    "KeyboardInterrupt": {"interrupt_behind"},
    "OSError": {"open", "read_text", "read_bytes", "write_text", "write_bytes", "mkdir", "load"},
}


def definitions(sources: dict[str, str]) -> list[tuple[str, Definition]]:
    return [
        (path, node)
        for path, source in sources.items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, Definition)
    ]


def names_in(node: ast.AST) -> set[str]:
    """Names and attributes that a definition uses, so what it may call."""
    loads = (n for n in ast.walk(node) if isinstance(n, ast.Name | ast.Attribute))
    return {n.id if isinstance(n, ast.Name) else n.attr for n in loads}


def raised_in(node: ast.AST) -> set[str]:
    raised = set()
    for found in ast.walk(node):
        if isinstance(found, ast.Raise) and found.exc is not None:
            raised |= names_in(found.exc)
    return raised


def untrue_promises(sources: dict[str, str]) -> list[str]:
    """Promises of exceptions that neither a function nor anything that it uses, by name, raises."""
    found = definitions(sources)
    uses, raised = defaultdict(set), defaultdict(set)
    for _, node in found:
        uses[node.name] |= names_in(node)
        raised[node.name] |= raised_in(node)

    @cache
    def possible(name: str) -> frozenset[str]:
        reached, waiting = set(), {name}
        while waiting:
            at = waiting.pop()
            reached.add(at)
            waiting |= (uses[at] & uses.keys()) - reached
        called = set().union(*(uses[at] for at in reached))
        errors = set().union(*(raised[at] for at in reached))
        return frozenset(errors | {error for error, callers in RAISED_BY.items() if callers & called})

    wrong = []
    for path, node in found:
        section = re.search(r"\n *Raises:\n(.*?)(?:\n *\n|\Z)", ast.get_docstring(node) or "", re.DOTALL)
        promised = re.findall(r"^ {4}(\w+):", section[1], re.MULTILINE) if section else []
        wrong += [f"{path}: {node.name} does not raise {e}" for e in promised if e not in possible(node.name)]
    return wrong


def test_docstrings_promise_only_exceptions_that_can_be_raised():
    sources = {str(path.relative_to(PACKAGE)): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}
    assert untrue_promises(sources) == []


def test_an_untrue_promise_is_found():
    source = '''
def check(x):
    raise ValueError(x)
def true(x):
    """Do.

    Raises:
        ValueError: if wrong.
    """
    check(x)
def untrue(x):
    """Do.

    Raises:
        ValueError: if wrong.
        KeyError: never.
    """
    check(x)
'''
    assert untrue_promises({"a.py": source}) == ["a.py: untrue does not raise KeyError"]
