"""The hash of what a rule computes, and not of how it is written.

A rule is committed before the runs that it judges, and its hash shows whether it still
is the same rule. So the hash must change with a constant, an operator, a grid or a
function that is called five calls away, and must not change when the code is tidied.
Each function is therefore reduced to its syntax tree, and each name in it to what the
name stands for:

    def share(savings):                        function of 1 argument
        "Percent that are worth it."           (a docstring: dropped)
        kept = [s >= WORTH for s in savings]   local 1 = [local 2 >= 5.0 for …]
        return 100 * fmean(kept)               return 100 * fmean of statistics

    a local variable, a parameter      its number, in the order of appearance
    a constant, of any module          its value: a renamed constant is the same one
    a function or class inside         its own hash, by the same reduction
    a function or class outside        its name, without the module that it is in
    "experiment": "scaling"            the name, and the hash of scaling.compute

Inside are the experiments, the rules and the statistics: all that turns a grid into
configurations, and runs into a verdict. Outside are the instruments: torch, numpy, and
the library's own models, methods and training loop. Their code is not followed, since
the provenance of each run names the commit that made it.

Docstrings, comments, annotations, the text of errors, and the names of what is inside
count for nothing: to reword, to rename and to move are free. The names of attributes,
of keyword-only arguments and of dictionary keys count, because code elsewhere may ask
for them. So does the name of a function outside, because to measure with another
instrument is another rule; FORMER_NAMES keeps the hash where only the name changed.
"""

import ast
import builtins
import inspect
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from functools import lru_cache, partial
from importlib import import_module
from importlib.util import find_spec
from itertools import count
from types import FunctionType, MethodType, ModuleType

from ..common.digest import digest
from . import experiments

PACKAGE = __name__.partition(".")[0]
# Rooms and modules of the package that are inside, wherever they stand in it.
INSIDE = {"experiments", "claim", "intervals", "rates", "statistics", "grid"}
# Functions and attributes of the library that were renamed: {name: name in hashes}.
FORMER_NAMES = {"replace_modules": "swap", "TrainConfig": "Recipe"}
COMPREHENSIONS = ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp
FUNCTIONS = ast.FunctionDef, ast.AsyncFunctionDef
# Of no effect on a value: how a tree was made, and what its author says of types.
SKIPPED = {"ctx", "kind", "type_comment", "type_params", "returns", "annotation"}


def content_hash(*roots) -> str:
    """Sixteen digits that change with what these functions compute.

    Args
        roots  functions, whatever module they are in, or values that hold functions
    Raises   TypeError  a value that has no stable description, or an import inside a
                        function, which is not followed
    """
    return digest(_Reduction(roots).values(roots))


class _Reduction:
    """Values as nested lists of texts and numbers, each function as a hash.

    home      modules that are inside because a root is in them
    open      functions and classes that are being reduced, the outermost first
    hashes    of those that are done
    farthest  the outermost of `open` that the innermost one has referred to
    """

    def __init__(self, roots: Iterable):
        self.home = {getattr(root, "__module__", None) for root in roots}
        self.open, self.hashes, self.farthest = [], {}, 0

    def values(self, values: Iterable) -> list:
        return [self.value(value) for value in values]

    def value(self, value):
        """One value; TypeError where nothing stable can be said of it."""
        if value is None or isinstance(value, bool | int | float | str):
            return ["value", value]
        if isinstance(value, bytes | complex | range | type(...)):
            return ["value", type(value).__name__, repr(value)]
        if type(value) in (tuple, list):
            return [type(value).__name__, *self.values(value)]
        if isinstance(value, Mapping):
            return ["dict", *(self.values(item) for item in value.items())]
        if isinstance(value, set | frozenset):
            return ["set", *sorted(self.values(value), key=json.dumps)]
        if isinstance(value, partial):
            parts = value.func, value.args, value.keywords
            return ["partial", *self.values(parts)]
        if isinstance(value, ModuleType):
            return ["module", value.__name__.rpartition(".")[2]]
        if isinstance(value, MethodType):
            return ["method", *self.values((value.__func__, value.__self__))]
        if callable(value) and hasattr(value, "__name__"):
            return self.named(inspect.unwrap(value))
        return self.instance(value)

    def instance(self, value):
        """A dataclass by its fields, an array by its numbers, a pattern by its text."""
        if is_dataclass(value):
            parts = {f.name: getattr(value, f.name) for f in fields(value)}
            return ["instance", *self.values((type(value), parts))]
        if hasattr(value, "tolist"):  # of torch or numpy
            return ["array", str(value.dtype), self.value(value.tolist())]
        if isinstance(value, re.Pattern):
            return ["pattern", value.pattern, value.flags]
        if type(value).__name__ in ("dtype", "device"):
            return ["value", type(value).__name__, str(value)]
        raise TypeError(
            f"{value!r:.60} ({type(value).__name__}) stands in a rule and has no "
            "stable description; use numbers, texts, containers of them, dataclasses "
            "or functions"
        )

    def named(self, thing):
        """A function or a class: its hash inside, its name outside."""
        module, name = thing.__module__ or "", thing.__qualname__
        if self.is_inside(module) and isinstance(thing, type | FunctionType):
            return self.definition(thing)
        if module.partition(".")[0] != PACKAGE:
            return ["outside", module.partition(".")[0], name.rpartition(".")[2]]
        if ".methods." in module:  # every method has an `inject`
            name = f"{module.rpartition('.')[2]}.{name}"
        return ["library", FORMER_NAMES.get(name, name)]

    def is_inside(self, module: str) -> bool:
        package, *parts = module.split(".")
        return module in self.home or (package == PACKAGE and bool(INSIDE & {*parts}))

    def definition(self, thing):
        """The hash of a function or class, or how many definitions above it is open."""
        if thing in self.hashes:
            return ["definition", self.hashes[thing]]
        depth = len(self.open)
        if thing in self.open:
            place = self.open.index(thing)
            self.farthest = min(self.farthest, place)
            return ["above", depth - place]
        outer, self.farthest = self.farthest, depth
        self.open.append(thing)
        reduced = digest(_Code(self, thing).reduced)
        self.open.pop()
        if self.farthest == depth:  # it refers to nothing that is still open
            self.hashes[thing] = reduced
        self.farthest = min(outer, self.farthest)
        return ["definition", reduced]

    def compute_of(self, experiment: str):
        """The `compute` that a configuration names; None where there is no such."""
        name = f"{experiments.__name__}.{experiment}"
        if not experiment.isidentifier() or find_spec(name) is None:
            return None
        return self.value(import_module(name).compute)


class _Scope:
    """Names that a function binds, each with a number; those of a class keep theirs."""

    def __init__(self, names: set[str], of_class: bool = False):
        self.names, self.of_class, self.numbers = names, of_class, {}


class _Code:
    """One function or class as nested lists: `reduced`."""

    def __init__(self, reduction: _Reduction, thing: Callable):
        self.reduction, self.scopes, self.counter = reduction, [], count()
        self.globals, self.closure = _names_around(thing)
        node = _node_of(thing)
        self.reduced = self.write(node)
        if isinstance(thing, FunctionType):  # as they are, after `lr=lr` in a loop
            defaults = thing.__defaults__, thing.__kwdefaults__
            self.reduced.append(reduction.values(defaults))

    # ------------------------------------------------------------------------- Names

    def binding(self, name: str):
        """The local of this name, ["local", number]; None for a global."""
        for scope in reversed(self.scopes):
            if name not in scope.names:
                continue
            if not scope.of_class:
                if name not in scope.numbers:
                    scope.numbers[name] = next(self.counter)
                return ["local", scope.numbers[name]]
            if scope is self.scopes[-1]:
                return ["attribute", name]
        return None

    def object(self, node):
        """(whether it is known before the code runs, the object): globals, modules'."""
        if isinstance(node, ast.Name) and self.binding(node.id) is None:
            for names in (self.closure, self.globals, vars(builtins)):
                if node.id in names:
                    return True, names[node.id]
            raise TypeError(f"{node.id!r} stands in a rule and is defined nowhere")
        if isinstance(node, ast.Attribute):
            known, owner = self.object(node.value)
            if known and isinstance(owner, ModuleType):
                return True, getattr(owner, node.attr)
        return False, None

    def write_Name(self, node):
        local = self.binding(node.id)
        return local or self.reduction.value(self.object(node)[1])

    def write_Attribute(self, node):
        known, value = self.object(node)
        if known:
            root = self.object(node.value)[1].__name__.partition(".")[0]
            if root != PACKAGE:  # torch.float32, np.pi
                return ["outside", root, node.attr]
            return self.reduction.value(value)
        name = FORMER_NAMES.get(node.attr, node.attr)
        return ["Attribute", self.write(node.value), name]

    # -------------------------------------------------------------------- Definitions

    def write_FunctionDef(self, node):
        name = self.binding(node.name) if self.scopes else None
        decorators = self.write(node.decorator_list)
        return [type(node).__name__, name, decorators, *self.function(node, node.body)]

    write_AsyncFunctionDef = write_FunctionDef

    def write_Lambda(self, node):
        return ["Lambda", *self.function(node, [ast.Return(node.body)])]

    def function(self, node, body: list) -> list:
        """[kinds of parameters, defaults, body], in a scope of its own."""
        a = node.args
        outermost = not self.scopes  # its defaults are taken as values
        defaults = [] if outermost else self.write([*a.defaults, *a.kw_defaults])
        positional = [*a.posonlyargs, *a.args]
        named = [
            arg.arg for arg in (*positional, *a.kwonlyargs, a.vararg, a.kwarg) if arg
        ]
        self.scopes.append(_Scope({*named, *_bound_by(body)}))
        for name in named:
            self.binding(name)
        only = [arg.arg for arg in a.kwonlyargs]
        kinds = [len(positional), only, a.vararg is not None, a.kwarg is not None]
        written = [kinds, defaults, self.statements(body)]
        self.scopes.pop()
        return written

    def write_ClassDef(self, node):
        name = self.binding(node.name) if self.scopes else None
        bases = self.write([*node.decorator_list, *node.bases, *node.keywords])
        self.scopes.append(_Scope(_bound_by(node.body), of_class=True))
        written = ["ClassDef", name, bases, self.statements(node.body)]
        self.scopes.pop()
        return written

    def statements(self, body: list) -> list:
        """Statements that do something: no docstring, no `pass`, no bare annotation."""
        kept = [s for s in body if not _does_nothing(s)]
        return [self.write(statement) for statement in kept]

    def write_AnnAssign(self, node):
        if node.value is None:  # the field of a dataclass
            return ["field", self.write(node.target)]
        return ["Assign", [self.write(node.target)], self.write(node.value)]

    # -------------------------------------------------------------------- Expressions

    def comprehension(self, node):
        first = self.write(node.generators[0].iter)  # in the scope around it
        targets = [ast.Expr(generator.target) for generator in node.generators]
        self.scopes.append(_Scope(_bound_by(targets)))
        loops = [
            [
                self.write(loop.target),
                first if loop is node.generators[0] else self.write(loop.iter),
                self.write(loop.ifs),
                loop.is_async,
            ]
            for loop in node.generators
        ]
        parts = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
        written = [type(node).__name__, loops, self.write(parts)]
        self.scopes.pop()
        return written

    write_ListComp = write_SetComp = write_DictComp = write_GeneratorExp = comprehension

    def write_Call(self, node):
        """A call; the keywords of a function inside are numbers of its parameters."""
        parameters = self.parameters(node.func)
        keywords = [
            [
                parameters.index(k.arg) if k.arg in parameters else k.arg,
                self.write(k.value),
            ]
            for k in node.keywords
        ]
        unpacked = any(k.arg is None for k in node.keywords)
        asked = list(parameters) if unpacked else []
        return ["Call", self.write(node.func), self.write(node.args), keywords, asked]

    def parameters(self, function) -> tuple[str, ...]:
        """Names of the positional parameters of a function inside; else ()."""
        known, callee = self.object(function)
        callee = inspect.unwrap(callee) if known and callable(callee) else None
        if not isinstance(callee, FunctionType):
            return ()
        if not self.reduction.is_inside(callee.__module__):
            return ()
        return callee.__code__.co_varnames[: callee.__code__.co_argcount]

    def write_Dict(self, node):
        items = zip(node.keys, node.values, strict=True)
        written = ["dict", *([self.write(k), self.write(v)] for k, v in items)]
        texts = {
            k.value: v.value
            for k, v in zip(node.keys, node.values, strict=True)
            if isinstance(k, ast.Constant) and isinstance(v, ast.Constant)
        }
        if isinstance(experiment := texts.get("experiment"), str):
            written.append(self.reduction.compute_of(experiment))
        return written

    def write_Constant(self, node):
        return self.reduction.value(node.value)

    def write_UnaryOp(self, node):
        negative = isinstance(node.op, ast.USub) and isinstance(
            node.operand, ast.Constant
        )
        if negative and isinstance(node.operand.value, int | float):
            return ["value", -node.operand.value]
        return self.generic(node)

    def write_Tuple(self, node):
        return ["tuple", *self.write(node.elts)]

    def write_List(self, node):
        return ["list", *self.write(node.elts)]

    def write_Raise(self, node):
        """The kind of error alone: what it says decides nothing."""
        error = node.exc
        return [
            "Raise",
            self.write(error.func if isinstance(error, ast.Call) else error),
        ]

    def write_ExceptHandler(self, node):
        name = self.binding(node.name) if node.name else None
        return ["except", name, self.write(node.type), self.statements(node.body)]

    def write_Import(self, node):
        raise TypeError(
            f"{ast.unparse(node)!r} inside a function of a rule is not followed; "
            "import it at the top of the module"
        )

    write_ImportFrom = write_Import

    # ------------------------------------------------------------------- All the rest

    def write(self, node):
        if isinstance(node, list):
            return [self.write(each) for each in node]
        if not isinstance(node, ast.AST):
            return node
        return getattr(self, f"write_{type(node).__name__}", self.generic)(node)

    def generic(self, node):
        """Type and fields; empty ones, which other Pythons may not have, left out."""
        written = [type(node).__name__]
        for name in node._fields:
            value = getattr(node, name, None)
            if name in SKIPPED or value is None or value == []:
                continue
            if name in ("body", "orelse", "finalbody") and isinstance(value, list):
                written.append([name, self.statements(value)])
            elif name in ("name", "rest", "names") and not isinstance(value, ast.AST):
                bound = [value] if isinstance(value, str) else value
                written.append([name, [self.binding(each) for each in bound]])
            else:
                written.append([name, self.write(value)])
        return written


def _bound_by(statements: list) -> set[str]:
    """The names that statements bind in their own scope."""
    names, elsewhere, todo = set(), set(), list(statements)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            names.add(node.id)
        elif isinstance(node, ast.Global | ast.Nonlocal):
            elsewhere.update(node.names)
        elif isinstance(node, COMPREHENSIONS):
            walrus = (n for n in ast.walk(node) if isinstance(n, ast.NamedExpr))
            names.update(n.target.id for n in walrus)
        elif isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            names.add(node.name)
        elif not isinstance(node, ast.Lambda):
            for name in (getattr(node, "name", None), getattr(node, "rest", None)):
                names.update({name} if isinstance(name, str) else ())
            todo.extend(ast.iter_child_nodes(node))
    return names - elsewhere


def _does_nothing(statement) -> bool:
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, ast.Constant)
    return isinstance(statement, ast.Pass)


def _names_around(thing) -> tuple[dict, dict]:
    """(globals, {name: value} of the functions around) of a function or class."""
    if isinstance(thing, type):
        return vars(inspect.getmodule(thing)), {}
    cells = zip(thing.__code__.co_freevars, thing.__closure__ or (), strict=True)
    return thing.__globals__, {name: cell.cell_contents for name, cell in cells}


def _node_of(thing):
    """The syntax tree of a function or a class, out of that of its file."""
    code = getattr(thing, "__code__", thing)
    lines, _ = inspect.findsource(code)
    nodes = [n for n in _definitions("".join(lines)) if _may_be(n, thing)]
    if len(nodes) > 1 and isinstance(nodes[0], ast.Lambda):
        nodes = [n for n in nodes if _holds(n.body, code)]
    if not nodes:
        raise TypeError(f"{thing!r} stands in a rule, and its source is not at hand")
    return nodes[-1]  # the innermost


def _may_be(node, thing) -> bool:
    """Whether a tree may be that of a class, or of a function by its first line."""
    if isinstance(thing, type):
        return isinstance(node, ast.ClassDef) and node.name == thing.__name__
    code = thing.__code__
    if isinstance(node, FUNCTIONS):
        first = min(n.lineno for n in (node, *node.decorator_list))
        return (first, node.name) == (code.co_firstlineno, code.co_name)
    lambda_ = isinstance(node, ast.Lambda) and code.co_name == "<lambda>"
    return lambda_ and node.lineno == code.co_firstlineno


def _holds(body, code) -> bool:
    """Whether all instructions of a lambda come from this expression."""
    start, end = (body.lineno, body.col_offset), (body.end_lineno, body.end_col_offset)
    places = [p for p in code.co_positions() if None not in p and p[2:] != (0, 0)]
    return all(start <= (p[0], p[2]) and (p[1], p[3]) <= end for p in places)


@lru_cache(maxsize=64)
def _definitions(text: str) -> tuple[ast.AST, ...]:
    """Every function, lambda and class of a file, outer ones before inner ones."""
    kinds = (*FUNCTIONS, ast.Lambda, ast.ClassDef)
    return tuple(n for n in ast.walk(ast.parse(text)) if isinstance(n, kinds))
