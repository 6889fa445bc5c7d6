"""Expressions that a .pt2 file keeps as text and that torch evaluates as code: sizes and guards."""

from __future__ import annotations

import ast

MAX_EXPRESSION = 4000

_FUNCTIONS = {
    *("Symbol", "Integer", "Add", "Mul", "Max", "Min", "Mod", "PythonMod", "FloorDiv", "CeilDiv", "CleanDiv"),
    *(
        "ModularIndexing",
        "Eq",
        "Ne",
        "Ge",
        "Gt",
        "Le",
        "Lt",
        "Not",
        "And",
        "Or",
        "Where",
        "max",
        "min",
        "Rational",
    ),
    *("IntTrueDiv", "FloatTrueDiv", "TruncToInt", "ToFloat", "CeilToInt", "FloorToInt", "Float", "Identity"),
    *("Equality", "Unequality", "GreaterThan", "StrictGreaterThan", "LessThan", "StrictLessThan", "Abs"),
}
_OPTIONS = {
    "positive",
    "integer",
    "nonnegative",
    "nonzero",
    "negative",
    "real",
    "precision",
    "even",
    "evaluate",
}
_ASKED = {"size", "stride", "storage_offset", "dim"}
_NODES = (
    *(
        ast.Expression,
        ast.BoolOp,
        ast.And,
        ast.Or,
        ast.BinOp,
        ast.UnaryOp,
        ast.Compare,
        ast.Load,
        ast.keyword,
    ),
    *(ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.USub, ast.UAdd, ast.Not),
    *(ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE),
)


def is_size(text: str) -> bool:
    """Whether a text is arithmetic on numbers and symbols, which sympy may evaluate."""
    tree = _tree(text)
    return tree is not None and all(_is_size_node(node) for node in ast.walk(tree)) and _calls_by_name(tree)


def is_guard(text: str) -> bool:
    """Whether a text compares sizes of the inputs with numbers, as `L['x'].size()[2] >= 3` does."""
    tree = _tree(text)
    if tree is None:
        return False
    return all(_is_size_node(node) or _is_guard_node(node) for node in ast.walk(tree))


def _tree(text: str) -> ast.Expression | None:
    if len(text) > MAX_EXPRESSION or not text.isascii() or not text.isprintable():
        return None
    try:
        return ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _is_size_node(node: ast.AST) -> bool:
    if isinstance(node, ast.Name):
        return node.id in _FUNCTIONS or _is_symbol(node.id)
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS
    if isinstance(node, ast.keyword):
        return node.arg in _OPTIONS
    if isinstance(node, ast.Constant):
        return _is_small(node.value)
    return isinstance(node, _NODES)


def _is_guard_node(node: ast.AST) -> bool:
    if isinstance(node, ast.Name):
        return node.id == "L"
    if isinstance(node, ast.Subscript):
        # an input by its name, or one of its sizes by its index
        names_input = isinstance(node.value, ast.Name) and node.value.id == "L"
        return isinstance(node.slice, ast.Constant) and (names_input or isinstance(node.slice.value, int))
    if isinstance(node, ast.Attribute):
        return node.attr in _ASKED
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Attribute) and not node.args and not node.keywords
    return False


def _calls_by_name(tree: ast.Expression) -> bool:
    """Whether text occurs only as the name of a symbol: sympy evaluates text given to anything else."""
    allowed = {
        id(node.args[0])
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "Symbol"
        and node.args
    }
    texts = [
        node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    return all(id(node) in allowed for node in texts)


def _is_small(value: object) -> bool:
    if isinstance(value, str):
        return value.isidentifier() and len(value) <= 200
    return isinstance(value, bool | float) or (isinstance(value, int) and abs(value) < 2**63)


def _is_symbol(name: str) -> bool:
    return name[0] in "suzfi" and name[1:].isdigit() and len(name) < 20
