"""Mutants: copies of a module's source that differ in one small thing.

Nothing is changed that only a human reads: docstrings, messages, annotations and names.
"""

import ast
import copy
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

# What else an operator could have been.
_OPERATORS: dict[type[ast.AST], list[type[Any]]] = {
    ast.Lt: [ast.LtE, ast.GtE],
    ast.LtE: [ast.Lt, ast.Gt],
    ast.Gt: [ast.GtE, ast.LtE],
    ast.GtE: [ast.Gt, ast.Lt],
    ast.Eq: [ast.NotEq],
    ast.NotEq: [ast.Eq],
    ast.Is: [ast.IsNot],
    ast.IsNot: [ast.Is],
    ast.In: [ast.NotIn],
    ast.NotIn: [ast.In],
    ast.And: [ast.Or],
    ast.Or: [ast.And],
    ast.Add: [ast.Sub],
    ast.Sub: [ast.Add],
    ast.Mult: [ast.FloorDiv],
    ast.Div: [ast.Mult],
    ast.FloorDiv: [ast.Mult],
    ast.Mod: [ast.FloorDiv],
    ast.Pow: [ast.Mult],
    ast.LShift: [ast.RShift],
    ast.RShift: [ast.LShift],
    ast.BitAnd: [ast.BitOr],
    ast.BitOr: [ast.BitAnd],
}
# What else a function or method could have been.
_NAMES = {
    "min": "max",
    "max": "min",
    "any": "all",
    "all": "any",
    "sorted": "list",
    "startswith": "endswith",
    "endswith": "startswith",
    "partition": "rpartition",
    "rpartition": "partition",
    "update": "setdefault",
    "append": "pop",
}
# Their arguments are types, or words for humans.
_WORDS = {"cast", "TypeVar", "NewType", "getLogger", "warn", "warning", "info", "debug"}
_UNSEEN = {"__all__", "__slots__", "__module__"}


class Mutant(NamedTuple):
    """One change to a module."""

    module: str  # the file, below the package's folder
    function: str  # the qualified name of the function, or "" outside of all
    line: int
    kind: str
    before: str  # the lines that change
    after: str
    source: str  # the whole module
    imported: bool  # the change takes effect when the module is imported

    @property
    def id(self) -> str:
        """A name that stays when lines elsewhere change."""
        words = [self.module, self.function, self.kind, self.before, self.after]
        return hashlib.sha256("\0".join(words).encode()).hexdigest()[:12]

    def is_drawn(self, seed: int, share: float) -> bool:
        """Whether the mutant is in the sample of a seed, whichever others there are."""
        number = hashlib.sha256(f"{seed} {self.id}".encode()).digest()[:8]
        return int.from_bytes(number, "big") < share * 2**64


def mutants_of(package: Path, module: str) -> list[Mutant]:
    """All mutants of a module, in the order of their lines; of equal ones the first."""
    source = (package / module).read_text()
    lines = source.encode().splitlines(keepends=True)
    found: dict[str, Mutant] = {}
    for spot in _spots(ast.parse(source), "", imported=True):
        for kind, old, new in _changes(spot.node):
            changed, before, after = _splice(lines, old, new)
            mutant = Mutant(
                module, spot.function, old.lineno, kind, before, after, changed, spot.imported
            )
            found.setdefault(mutant.id, mutant)
    return sorted(found.values(), key=lambda mutant: mutant.line)


class _Spot(NamedTuple):
    node: Any
    function: str
    line: int
    imported: bool


def _spots(node: ast.AST, function: str, imported: bool) -> Iterator[_Spot]:
    """All nodes that may change, with the function that each is in."""
    for child in _decisive(node):
        yield _Spot(child, function, getattr(child, "lineno", 0), imported)
        if isinstance(child, ast.ClassDef):
            yield from _spots(child, f"{function}.{child.name}".lstrip("."), imported)
        elif isinstance(child, ast.FunctionDef | ast.Lambda):
            name = getattr(child, "name", "<lambda>")
            inner = f"{function}.{name}".lstrip(".")
            # Default values belong to what is around the function.
            yield from _spots(child.args, function, imported)
            body: list[Any] = child.body if isinstance(child.body, list) else [child.body]
            yield from _spots(ast.Module(body, []), inner, imported=False)
        else:
            yield from _spots(child, function, imported)


def _decisive(node: ast.AST) -> Iterator[ast.AST]:
    """The parts of a node, without those that decide nothing."""
    if isinstance(node, ast.JoinedStr | ast.Raise | ast.Assert | ast.Import | ast.ImportFrom):
        return
    if isinstance(node, ast.Call) and _name_of(node.func) in _WORDS:
        return
    if isinstance(node, ast.keyword) and node.arg == "strict":  # as `assert`
        return
    if isinstance(node, ast.If) and _name_of(node.test) == "TYPE_CHECKING":
        return
    if isinstance(node, ast.Assign) and _name_of(node.targets[0]) in _UNSEEN:
        return
    if isinstance(node, ast.AnnAssign) and _name_of(node.annotation) == "TypeAlias":
        return
    for field, value in ast.iter_fields(node):
        if field in {"annotation", "returns", "decorator_list", "bases"}:
            continue
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant):
                continue  # a docstring
            if isinstance(part, ast.AST):
                yield part


def _name_of(node: ast.AST) -> str:
    return getattr(node, "id", None) or getattr(node, "attr", None) or ""


def _changes(node: Any) -> Iterator[tuple[str, Any, ast.AST]]:
    """Kinds of changes, what of the node they replace, and by what."""
    match node:
        case ast.Compare(ops=ops):
            for number, op in enumerate(ops):
                for other in _OPERATORS[type(op)]:
                    yield "comparison", node, _with(node, f"ops.{number}", other())
        case ast.BoolOp(op=op) | ast.BinOp(op=op) | ast.AugAssign(op=op):
            for other in _OPERATORS.get(type(op), []):
                yield "operator", node, _with(node, "op", other())
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield "operator", node, node.operand
        case ast.Constant(value=value):
            for other in _constants(value):
                yield "constant", node, ast.Constant(other)
        case ast.Return(value=value) if value and not isinstance(value, ast.Constant):
            yield "return None", node, ast.Return(ast.Constant(None))
        case ast.Break() | ast.Continue():
            yield "statement", node, ast.Continue() if isinstance(node, ast.Break) else ast.Break()
        case ast.Slice():
            for part in ("lower", "upper"):
                if getattr(node, part):
                    yield "slice", node, _with(node, part, None)
        case ast.Call():
            yield from _changed_calls(node)
    if isinstance(node, ast.Expr | ast.AugAssign | ast.Raise | ast.Delete):
        yield "no statement", node, ast.Pass()
    for test in _conditions(node):
        yield "negated condition", test, ast.UnaryOp(ast.Not(), test)


def _changed_calls(call: ast.Call) -> Iterator[tuple[str, ast.AST, ast.AST]]:
    name, args = _name_of(call.func), call.args
    if name in _WORDS:
        return
    if len(args) > 1 and not any(isinstance(arg, ast.Starred) for arg in args[:2]):
        yield "swapped arguments", call, _with(call, "args", [args[1], args[0], *args[2:]])
    for number, keyword in enumerate(call.keywords):
        if keyword.arg == "strict":
            continue
        rest = call.keywords[:number] + call.keywords[number + 1 :]
        yield "no argument", call, _with(call, "keywords", rest)
    if name in _NAMES:
        part = "id" if isinstance(call.func, ast.Name) else "attr"
        yield "function", call, _with(call, f"func.{part}", _NAMES[name])


def _conditions(node: Any) -> list[ast.expr]:
    """What a node decides by, unless changes of its operator negate it."""
    match node:
        case ast.If() | ast.While() | ast.IfExp():
            tests = [node.test]
        case ast.comprehension():
            tests = node.ifs
        case _:
            tests = []
    return [test for test in tests if not isinstance(test, ast.Compare | ast.UnaryOp)]


def _constants(value: object) -> list[Any]:
    match value:
        case bool():
            return [not value]
        case int():
            return [value + 1, value - 1] if value else [1]
        case str() if value and " " not in value:  # with spaces it is prose
            return ["", f"{value}X"]
        case str() if not value:
            return ["X"]
        case bytes():
            return [value + b"X"]
    return []


def _with(node: Any, path: str, value: Any) -> Any:
    """A copy of a node with another value in one place, such as `ops.0`."""
    changed = at = copy.deepcopy(node)
    *above, last = path.split(".")
    for step in above:
        at = getattr(at, step)
    if last.isdigit():
        at[int(last)] = value
    else:
        setattr(at, last, value)
    return changed


def _splice(lines: list[bytes], old: Any, new: ast.AST) -> tuple[str, str, str]:
    """Replace a node in the source, where all other lines keep their numbers."""
    first, last = old.lineno - 1, old.end_lineno
    taken = b"".join(lines[first:last])
    head = lines[first][: old.col_offset]
    tail = lines[last - 1][old.end_col_offset :]
    text = ast.unparse(new) + "\n" * (last - 1 - first)
    if isinstance(old, ast.expr) and not isinstance(old, ast.Slice | ast.Constant):
        text = f"({text})"
    place = head + text.encode() + tail
    changed = b"".join([*lines[:first], place, *lines[last:]]).decode()
    return changed, _flat(taken.decode()), _flat(place.decode())


def _flat(text: str) -> str:
    return " ".join(text.split())
